"""Archives as publishers offer data sets: downloaded, checked, unpacked into a folder that is complete or not there."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock


@dataclass(frozen=True)
class Archive:
    """A data set as it is published: one file, and the folder in it."""

    url: str
    md5: str
    folder: str


def provide(name: str, archive: Archive, root: Path, download: bool) -> Path:
    """Return a data set's folder in `root`. If it is not there, unpack the archive from `root`, or download it.

    Raises FileNotFoundError with the places tried and what to do; ValueError if the archive's checksum is wrong."""
    file = archive.url.rpartition("/")[2]
    folder, packed = root / archive.folder, root / file
    places = f"{folder.absolute()}, and {file} is not beside it (root: as given, else $EFFNET_DATA, else data/)"
    if folder.is_dir():
        return folder
    if not packed.is_file() and not download:
        raise FileNotFoundError(f"{name} is not at {places}; fetch it with: effnet data {name}")
    from torchvision.datasets import utils  # takes as long as importing torch

    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / f".{name}.lock"):
        for left in root.glob(f".fetching-{name}-*"):  # by a killed process
            shutil.rmtree(left)
        if folder.is_dir():  # another process has made it meanwhile
            return folder
        with tempfile.TemporaryDirectory(prefix=f".fetching-{name}-", dir=root) as place:
            if not packed.is_file():
                packed = Path(place) / file
                try:
                    utils.download_url(archive.url, place, file, archive.md5)
                except Exception as error:  # of the address, the network or the checksum
                    raise FileNotFoundError(
                        f"{name} is not at {places}, and fetching it failed ({type(error).__name__}: {error}). "
                        f"With a network: effnet data {name}; without one: put {file} there by hand"
                    ) from None
            elif (md5 := utils.calculate_md5(packed)) != archive.md5:
                raise ValueError(f"{packed} is damaged: its md5 is {md5}, expected {archive.md5}; fetch it again")
            utils.extract_archive(packed, f"{place}/unpacked")
            Path(place, "unpacked", archive.folder).rename(folder)
    return folder
