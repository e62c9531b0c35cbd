"""Where the files of a served model are: in a folder, or in the cache of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Origin(NamedTuple):
    """A folder or a name on the hub, its revision there, and where the hub's files are kept (None: the usual place)."""

    model: str
    revision: str | None
    cache: str | None

    def folder(self) -> Path | None:
        """The folder with what is here already; None where vLLM keeps it elsewhere."""
        from huggingface_hub import snapshot_download

        if Path(self.model).is_dir():
            return Path(self.model)
        try:
            found = snapshot_download(self.model, revision=self.revision, cache_dir=self.cache, local_files_only=True)
        except Exception:  # it is not of the hub, or not in its cache
            return None
        return Path(found)

    def file(self, name: str) -> Path:
        """A file of the model, from the hub where it is not here."""
        if Path(self.model).is_dir():
            return Path(self.model) / name
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.model, name, revision=self.revision, cache_dir=self.cache))
