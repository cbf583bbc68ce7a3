"Forty identifiers in a DICOM file's tags, private tags, sequences, preamble and name: none is found in what the service keeps, answers or logs."
import io, logging
from pathlib import Path

import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from cxr_pred.clinic.api import create_app
from cxr_pred.core import root
from cxr_pred.store import Store
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.toy import toy_bundle, toy_patterns

# Tags of PS3.15 table E.1-1 with a text, a date, a time, a number or a UID that nothing else here contains.
TEXTS = ("PatientName PatientID OtherPatientNames PatientBirthName PatientMotherBirthName PatientAddress PatientTelephoneNumbers EthnicGroup Occupation AdditionalPatientHistory PatientComments "
         "InstitutionName InstitutionAddress InstitutionalDepartmentName ReferringPhysicianName PerformingPhysicianName OperatorsName PhysiciansOfRecord NameOfPhysiciansReadingStudy "
         "StationName DeviceSerialNumber AccessionNumber StudyID StudyDescription SeriesDescription ProtocolName RequestedProcedureDescription AdmissionID IssuerOfPatientID "
         "MilitaryRank CountryOfResidence RegionOfResidence ImageComments DerivationDescription RequestingService MedicalRecordLocator").split()
OTHERS = {"PatientBirthDate": "19430217", "StudyDate": "20190711", "StudyTime": "081733.417", "AcquisitionDateTime": "20190711081735.553",
          "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.7700001", "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.7700002", "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.7700003"}


def secret(i: int) -> str: return f"Zq{i:03d}Xwv"


def planted() -> tuple[bytes, str, list[str]]:
    "A DICOM film, its file name, and everything that must not be found again."
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = ComputedRadiographyImageStorage, "1.2.826.0.1.3680043.8.498.7700004", ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta, ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PatientAge, ds.PatientSex = meta, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, "CR", "061Y", "F"
    words = []
    for name in TEXTS:
        if pydicom.datadict.tag_for_keyword(name) is None: continue   # a made-up word plants nothing
        words.append(secret(len(words))); setattr(ds, name, words[-1])
    for name, value in OTHERS.items(): setattr(ds, name, value); words.append(value)
    words.append(meta.MediaStorageSOPInstanceUID)
    inner = Dataset(); inner.PatientID = secret(900); ds.OtherPatientIDsSequence = [inner]
    block = ds.private_block(0x0011, "ACME CR", create=True)
    block.add_new(0x01, "LO", secret(901)); block.add_new(0x02, "OB", secret(902).encode()); block.add_new(0x03, "UT", secret(903))
    ds.preamble = secret(904).encode().ljust(128, b"\0")
    pixels = toy_patterns()[1]
    pixels = (255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8)
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = *pixels.shape, 8, 8, 7
    ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation, ds.PixelData = 1, 0, "MONOCHROME2", pixels.tobytes()
    out = io.BytesIO(); pydicom.dcmwrite(out, ds, enforce_file_format=True)
    words += [secret(i) for i in range(900, 905)]
    data, name = out.getvalue(), f"{secret(905)}_{secret(906)}.dcm"
    assert all(w.encode() in data for w in words), "each is really in the file"
    return data, name, words + [secret(905), secret(906)]


@pytest.fixture
def service(tmp_path, tmp_path_factory):
    classifier = Classifier(toy_bundle(tmp_path_factory.mktemp("bundle"), root() / "nbs" / "language" / "facts.yaml"))
    store = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state")
    with TestClient(create_app(classifier, store, ui=False), raise_server_exceptions=False) as client:
        for _ in range(1000):
            if client.get("/readyz").status_code == 200: break
        yield client, tmp_path
    store.close()


def everything_below(folder: Path) -> bytes:
    "All bytes kept, and what the kept pictures carry beside their pixels."
    out = []
    for p in sorted(folder.rglob("*")):
        if not p.is_file(): continue
        out += [p.name.encode(), p.read_bytes()]
        if p.suffix == ".png":
            with Image.open(p) as picture: picture.load(); out.append(repr(picture.info).encode())
    return b"\n".join(out)


def test_nothing_that_names_a_patient_is_kept_answered_or_logged(service, caplog, capfd):
    client, folder = service
    data, name, words = planted()
    assert len(words) >= 40
    caplog.set_level(logging.DEBUG)
    good = client.post("/v1/predict", files={"file": (name, data)}, data={"patient_ref": secret(907)})
    cut = client.post("/v1/predict", files={"file": (name, data[:-2000])})
    lost = client.post("/v1/predict", files={"file": (name, data[:600])})
    assert good.status_code == 200 and cut.status_code in (200, 422) and lost.status_code in (415, 422), (good.text, cut.text, lost.text)
    assert sum(1 for _ in folder.rglob("*.png")) >= 1, "the film is kept"
    printed = capfd.readouterr()
    words.append(secret(907))
    # the file's name goes back to whoever sent it, and nowhere else
    answered = (good.text + cut.text + lost.text).replace(name, "")
    for where, said in (("the store", everything_below(folder)), ("the log", caplog.text.encode()), ("what was printed", (printed.out + printed.err).encode()), ("the answers", answered.encode())):
        assert not (found := [w for w in words if w.encode() in said]), f"{where} holds {found}"


def test_texts_inside_a_picture_file_are_not_kept(service):
    client, folder = service
    pixels = toy_patterns()[1]
    picture, notes, exif = Image.fromarray((255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8)), PngImagePlugin.PngInfo(), Image.Exif()
    notes.add_text("Patient", secret(1)); notes.add_itxt("Comment", secret(2), zip=False); exif[0x010E] = secret(3)
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG", pnginfo=notes); picture.save(jpeg, "JPEG", exif=exif, comment=secret(4).encode())
    assert secret(1).encode() in png.getvalue() and secret(3).encode() in jpeg.getvalue() and secret(4).encode() in jpeg.getvalue()
    for name, data in (("a.png", png.getvalue()), ("a.jpg", jpeg.getvalue())): assert client.post("/v1/predict", files={"file": (name, data)}).status_code == 200
    kept = everything_below(folder)
    assert not [i for i in range(1, 5) if secret(i).encode() in kept]
