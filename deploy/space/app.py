"The page as a Hugging Face Space. Films live in a folder of this run and are deleted after an hour; nobody has the physicians' key."
import os
import secrets
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
for name, value in {"CXR_BUNDLE": str(HERE / "bundle"), "CXR_STATE": tempfile.mkdtemp(prefix="cxr-"), "CXR_RETENTION_DAYS": str(1 / 24),
                    "CXR_PHYSICIAN_KEY": secrets.token_urlsafe(32), "CXR_MAX_UPLOAD_MB": "20"}.items(): os.environ.setdefault(name, value)

from cxr_pred.clinic.starting import serve  # after the settings: they are read once
from cxr_pred.clinic.door import HEADERS

# a Space is shown inside a page of huggingface.co; everywhere else framing stays forbidden
HEADERS.pop("X-Frame-Options")
HEADERS["Content-Security-Policy"] = HEADERS["Content-Security-Policy"].replace("frame-ancestors 'none'", "frame-ancestors 'self' https://huggingface.co")

if __name__ == "__main__": serve(os.environ.get("HOST", "0.0.0.0"), int(os.environ.get("PORT", "7860")))
