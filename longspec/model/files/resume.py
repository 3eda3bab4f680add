"""Download of one large file into Hugging Face's cache, which goes on where an interrupted one stopped.

Takes a repository and a file; gives its path in the cache, as `hf_hub_download` does. That function begins anew in
every process since huggingface_hub 2: gigabytes, on a line that breaks. So the file's bytes are fetched here, by the
same library's own `http_get`, under a name that stays, and are handed over when they are whole.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from longspec.errors import ModelError
from longspec.model.files.store import Report, need_room, quiet

__all__ = ["download"]

_CHUNK = 1 << 20  # bytes read at a time
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(repository: str, file: str, report: Report = quiet) -> Path:
    """The file's path in the cache, fetched if it isn't there.

    Raises ModelError where the disk is too small or the bytes aren't those that were asked for; huggingface_hub's own
    errors otherwise.
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import get_hf_file_metadata, repo_folder_name
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented all the same

    headers = build_hf_headers()
    url = hf_hub_url(repository, file)
    about = get_hf_file_metadata(url, headers=headers)
    if about.etag is not None and about.size is not None:
        blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"), "blobs")
        if not (blobs / about.etag).exists():
            own = about.location == url  # elsewhere the address is signed, and the token is nobody's business
            _fetch(about, blobs, file, headers if own else {}, report)
    return Path(hf_hub_download(repository, file, cache_dir=constants.HF_HUB_CACHE))


def _fetch(about: Any, blobs: Path, file: str, headers: dict[str, str], report: Report) -> None:
    """Fetch what is missing of a blob, check it, and give it its name. Another process waits for this one."""
    import fcntl

    from huggingface_hub.file_download import http_get

    blobs.mkdir(parents=True, exist_ok=True)
    part, whole = blobs / f"{about.etag}.incomplete", blobs / about.etag
    with part.open("ab") as target:
        fcntl.flock(target, fcntl.LOCK_EX)
        if whole.exists():
            part.unlink(missing_ok=True)
            return
        held = target.tell()
        if held > about.size:
            held = target.truncate(0)
        need_room(blobs, about.size - held)
        http_get(
            about.location,
            target,
            resume_size=held,
            headers=headers,
            expected_size=about.size,
            displayed_filename=file,
        )
        target.flush()
        if _SHA256.fullmatch(about.etag) and _digest(part, about.size, report) != about.etag:
            part.unlink()
            raise ModelError(f"{file} came with other bytes than Hugging Face names by their SHA-256; fetch it again.")
        part.rename(whole)


def _digest(path: Path, nbytes: int, report: Report) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            report("checking", file.tell(), nbytes)
    return digest.hexdigest()
