"""What no example shows: hostile and mutated files, memory, imports, silence, real DICOM objects."""
import io, json, os, subprocess, sys, zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageDraw, ImageFont

from cxr_pred.core import InputError
from cxr_pred.data.images import Film, decode, kind_of, preprocess, read_film
from cxr_pred.data.quality import has_text, looks_blank

ROOT = Path(__file__).resolve().parents[1]
DICOM = ROOT.parent / "shared" / "data" / "dicom"
CODES = {"empty_file", "unsupported_format", "truncated", "corrupt", "too_large", "multi_frame", "dicom_no_pixels", "dicom_no_transfer_syntax", "decode_memory"}


def chest(h=96, w=80):
    "A small synthetic film."
    y, x = np.mgrid[0:h, 0:w]
    return (60 + 150 * np.exp(-((x - w / 2) / 9.) ** 2) + 25 * np.cos(y / 4.)).clip(0, 255).astype(np.uint8)


def encoded(kind, **kw):
    out = io.BytesIO(); Image.fromarray(chest()).save(out, kind, **kw)
    return out.getvalue()


def dicom(**tags):
    "The bytes of a small DICOM film."
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian
    meta = FileMetaDataset(); meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3"
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    a = chest().astype(np.uint16) * 4
    for k, v in (dict(SOPClassUID=ComputedRadiographyImageStorage, SOPInstanceUID="1.2.3", Modality="CR", PhotometricInterpretation="MONOCHROME2", SamplesPerPixel=1, Rows=a.shape[0], Columns=a.shape[1],
                     BitsAllocated=16, BitsStored=10, HighBit=9, PixelRepresentation=0, WindowCenter=512, WindowWidth=1024, PatientAge="0 years", PixelData=a.tobytes()) | tags).items(): setattr(ds, k, v)
    out = io.BytesIO(); ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def deflated(*parts):
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(map(squeeze.compress, parts)) + squeeze.flush()


START = bytes(128) + b"DICM"
NAMED = b"\2\0\x10\0UI\x16\x001.2.840.10008.1.2.1.99"                           # transfer syntax: deflated
FILLER = b"\2\0\2\1OB\0\0" + (4000).to_bytes(4, "little") + bytes(4000)         # private information, pushes it beyond the first kilobyte
LENGTH = b"\2\0\0\0UL\4\0" + len(NAMED).to_bytes(4, "little")                    # group length
COMMAND = b"\0\0\0\1US\2\0\1\0"                                                # a command set, which pydicom skips before it unfolds
HEADS = {"usual": START + LENGTH + NAMED, "no group length": START + NAMED, "far down": START + FILLER + NAMED, "no preamble": NAMED, "said twice": START + NAMED + NAMED,
         "wrong group length": START + LENGTH[:-4] + b"\xff\0\0\0" + NAMED, "command set": START + NAMED + COMMAND}
WHOLE = {"PNG": encoded("PNG"), "JPEG": encoded("JPEG"), "TIFF": encoded("TIFF"), "DICOM": dicom(), "DEFLATED": START + NAMED + deflated(dicom()[dicom().index(b"\x08\0\x16\0UI"):])}


def outcome(data):
    "The film, or the code of the only kind of error that may come."
    try: return decode(data, "film")
    except InputError as e: return e.code


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files_decode(kind):
    film = outcome(WHOLE[kind])
    assert isinstance(film, Film) and film.pixels.dtype == np.uint8 and film.pixels.shape == (96, 80)
    assert abs(film.pixels.astype(int) - chest()).mean() < 2


@pytest.mark.parametrize("kind", WHOLE)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_files_are_films_or_known_errors(kind, data):
    b = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 8))): b[data.draw(st.integers(0, len(b) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(b)))
    b = bytes(b[:cut] if data.draw(st.booleans()) else b)
    got = outcome(b)
    assert got in CODES if isinstance(got, str) else got.pixels.ndim == 2 and got.pixels.dtype == np.uint8


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"\0" * 128 + b"DICM", b"\x08\0\x05\0"]))
def test_noise_is_refused(noise, head):
    assert outcome(head + noise) in CODES


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "DICOM"])
def test_a_cut_file_is_refused(kind, keep):
    whole = WHOLE[kind]
    assert outcome(whole[:int(len(whole) * keep)]) in {"truncated", "corrupt", "unsupported_format", "dicom_no_pixels"}


def python(code, **kw):
    "Run code in a fresh interpreter."
    return subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, **kw)


def test_bomb_costs_no_memory(tmp_path):
    import struct, zlib
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    squeeze = zlib.compressobj(9); idat = b"".join(squeeze.compress(bytes(30_001)) for _ in range(30_000)) + squeeze.flush()
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", idat) + chunk(b"IEND", b""))
    r = python(f"""
import json, resource
from cxr_pred.core import InputError
from cxr_pred.data.images import read_film
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try: read_film({str(tmp_path / 'bomb.png')!r}); code = 'ok'
except InputError as e: code = e.code
print(json.dumps([code, (peak() - before) / 1024]))""")
    code, grown = json.loads(r.stdout)
    assert code == "too_large" and grown < 50, f"{grown:.0f} MB for a refused file"
    assert r.stderr == ""


@pytest.mark.parametrize("head", HEADS)
def test_deflate_bomb_costs_no_memory_however_it_is_named(head, tmp_path):
    inside = deflated(*[bytes(2**24)] * 18)
    for name, body in (("bomb", inside), ("twice", deflated(NAMED, inside))): (tmp_path / name).write_bytes(HEADS[head] + body)
    r = python(f"""
import json, resource
import pydicom
from cxr_pred.core import InputError
from cxr_pred.data.images import read_film
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
codes, before = [], peak()
for name in ('bomb', 'twice'):
    try: read_film({str(tmp_path)!r} + '/' + name); codes.append('ok')
    except InputError as e: codes.append(e.code)
print(json.dumps([codes, (peak() - before) / 1024]))""", env=os.environ | {"CXR_MAX_PIXELS": "1000000"})
    (bomb, twice), grown = json.loads(r.stdout)
    assert bomb in {"too_large", "corrupt"} and (head == "command set" or bomb == "too_large") and twice in {"corrupt", "too_large"}
    assert grown < 50, f"{grown:.0f} MB for a refused file that unfolds to 300"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pydicom_never_unfolds(data):
    import pydicom.filereader as reader
    from unittest.mock import patch
    b = bytearray(HEADS[data.draw(st.sampled_from(sorted(HEADS)))])
    for _ in range(data.draw(st.integers(0, 3))): b[data.draw(st.integers(0, len(b) - 1))] = data.draw(st.integers(0, 255))
    with patch.object(reader, "zlib") as unfolds: outcome(bytes(b) + deflated(dicom()[144:]))
    assert not unfolds.decompress.called


def test_import_is_light():
    r = python("import sys, cxr_pred.data.images; print([m for m in ('torch', 'pandas', 'scipy', 'pydicom', 'matplotlib', 'gradio') if m in sys.modules])")
    assert r.stdout.strip() == "[]", r.stdout + r.stderr


def test_dicom_says_nothing(tmp_path):
    (tmp_path / "odd.dcm").write_bytes(dicom())   # its age string is invalid; pydicom would warn
    r = python(f"from cxr_pred.data.images import read_film; print(read_film({str(tmp_path / 'odd.dcm')!r}).meta)")
    assert r.returncode == 0 and r.stderr == "" and "'age': None" in r.stdout


def test_missing_file_is_named_without_its_folder(tmp_path):
    with pytest.raises(InputError) as e: read_film(tmp_path / "nowhere.png")
    assert e.value.code == "not_found" and str(tmp_path) not in str(e.value)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 300), st.integers(8, 300), st.integers(0, 255), st.integers(0, 255))
def test_preprocess_any_shape(h, w, low, high):
    a = np.linspace(min(low, high), max(low, high), h * w).round().astype(np.uint8).reshape(h, w)
    p = preprocess(a)
    assert p.shape == (224, 224) and p.dtype == np.uint8
    if not looks_blank(a) and min(h, w) > 40: assert p.max() > 200 and p.min() < 55


# Real objects: what each must come out as.
REAL = {
    "CR-MONO1-10-chest.dcm": ((440, 440), {"monochrome1_inverted", "transfer_syntax_guessed"}, "CHEST"),
    "CR-ModalitySequenceLUT.dcm": ((1976, 1576), {"monochrome1_inverted"}, None),
    "RG1_J2KI.dcm": ((1841, 1955), {"monochrome1_inverted"}, "CHEST"),
    "RG1_J2KR.dcm": ((1841, 1955), {"monochrome1_inverted"}, "CHEST"),
    "RG3_J2KI.dcm": ((1760, 1760), {"monochrome1_inverted"}, "EXTREMITY"),
    "txrv_1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm": ((1024, 1024), set(), "CHEST"),
}


@pytest.mark.skipif(not DICOM.is_dir(), reason="no real DICOM objects beside the project")
@pytest.mark.parametrize("name", REAL)
def test_real_dicom(name):
    size, flags, part = REAL[name]
    film = read_film(DICOM / name)
    assert film.size == size and flags <= set(film.flags) and film.meta["body_part"] == part
    assert film.colour == 0 and np.ptp(film.pixels) > 200


@pytest.mark.skipif(not DICOM.is_dir(), reason="no real DICOM objects beside the project")
def test_lossless_and_lossy_agree_and_a_forged_tag_inverts():
    lossless, lossy = (preprocess(read_film(DICOM / f"RG1_J2K{c}.dcm").pixels).astype(int) for c in "RI")
    assert abs(lossless - lossy).mean() < 2
    true, forged = (read_film(DICOM / f"txrv_{n}.dcm").pixels.astype(int) for n in ("1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819", "Fake_MONOCHROME1"))
    assert (true + forged == 255).all()
    assert "looks_negative" in read_film(DICOM / "txrv_Fake_MONOCHROME1.dcm").flags


def test_kind_ignores_the_name():
    assert kind_of(WHOLE["JPEG"]) == "JPEG" and isinstance(decode(WHOLE["JPEG"], "film.png"), Film)


@pytest.mark.parametrize("age, known", [("089Y", 89), ("090Y", 90), ("097Y", 90), ("120Y", 90), ("121Y", None)])
def test_no_exact_age_over_89_leaves_the_decoder(age, known):
    assert decode(dicom(PatientAge=age)).meta["age"] == known


def test_monochrome_with_more_samples_is_refused():
    three = np.stack([chest().astype(np.uint16)] * 3, -1)
    assert outcome(dicom(SamplesPerPixel=3, PlanarConfiguration=0, PixelData=three.tobytes())) == "corrupt"


def lettered(text, size, level=255, turned=False, at=(30, 20)):
    "A film of 640 x 512 with a line of text."
    y, x = np.mgrid[0:640, 0:512]
    film = Image.fromarray((70 + 120 * np.exp(-((x - 256) / 90.) ** 2) + 10 * np.cos(y / 30.)).astype(np.uint8))
    font = ImageFont.load_default(size); line = Image.new("L", tuple(int(v) + 2 for v in font.getbbox(text)[2:]), 0)
    ImageDraw.Draw(line).text((1, 0), text, fill=255, font=font)
    if turned: line = line.rotate(90, expand=True)
    film.paste(level, at, line)
    return np.asarray(film)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("text, size, level", [("SMITH JOHN", 14, 255), ("12/03/2019", 20, 230), ("ST MARY HOSPITAL", 26, 255), ("PORTABLE", 18, 0)])
def test_a_line_of_letters_is_flagged(text, size, level, turned):
    p = lettered(text, size, level, turned)
    assert has_text(p) and "burnt_in_text" in decode(_png(p)).flags
    assert has_text(255 - p), "dark letters are as many as bright ones"


@pytest.mark.parametrize("text, size", [("L", 40), ("R", 24), ("R", 56), ("RT", 30), ("JD", 22)])
def test_a_lead_marker_is_no_text(text, size):
    assert not has_text(lettered(text, size)) and not has_text(lettered(text, size, turned=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_text_is_looked_for_in_films_of_any_shape(h, w, seed):
    assert has_text(np.random.default_rng(seed).integers(0, 2, (h, w), dtype=np.uint8) * 255) in (True, False)


def _png(pixels):
    out = io.BytesIO(); Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
