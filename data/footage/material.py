"""Photos and clips of a folder, split by whole file and read once into arrays that workers share.

A prepared file is a pyramid: level n is `[F, h, w, 3]` uint8 at 1 / 2**n of the first level's size,
each a `.npy` that is mapped, not read. A photo has one frame.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.processes import map_in_order
from data.video import VideoError, probe, read_frames
from infra.runtime.errors import UserError

PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
CLIPS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")
SPLITS = ("train", "heldout")
HELDOUT_LIST = "heldout.txt"  # in the footage folder: the names that are held out, one a line
HELDOUT_SHARE = 8  # without it: one file in eight, by the hash of its name
CLIP_SECONDS = 15  # a longer clip is cut
ZOOM = {"photo": 7.0, "clip": 2.25}  # first level's short side, in short sides of the pairs
SMALLEST_SIDE = 24  # pixels: no level is smaller

INDEX = "footage.json"


class FootageError(UserError):
    """A folder that holds no usable footage; the message names it and says what is missing."""


@dataclass(frozen=True)
class Material:
    """One prepared photo or clip."""

    name: str  # of its file
    kind: str  # "photo" or "clip"
    levels: tuple[str, ...]  # .npy files, largest first

    def level(self, number: int) -> np.ndarray:
        """uint8 [F, h, w, 3], mapped from disk."""
        return _mapped(self.levels[number])


@dataclass(frozen=True)
class Footage:
    """Everything that a folder's pairs of one split are made from."""

    folder: Path  # of the prepared arrays
    split: str

    @cached_property
    def materials(self) -> tuple[Material, ...]:
        entries = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))[self.split]
        return tuple(
            Material(
                entry["name"],
                entry["kind"],
                tuple(str(self.folder / level) for level in entry["levels"]),
            )
            for entry in entries
        )

    @cached_property
    def photos(self) -> tuple[Material, ...]:
        return tuple(item for item in self.materials if item.kind == "photo")

    @cached_property
    def clips(self) -> tuple[Material, ...]:
        return tuple(item for item in self.materials if item.kind == "clip")


def is_heldout(name: str, listed: frozenset[str] | None = None) -> bool:
    """Whether a file's photo or clip belongs to the held-out split, by its name alone."""
    if listed is not None:
        return name in listed
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0


def prepare(
    source: str | Path,
    folder: str | Path,
    *,
    height: int,
    width: int,
    fps: float,
    workers: int = 0,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Footage]:
    """Read every photo and clip under `source` into `folder`; the footage of each split.

    `on_file` hears how many of all files are done.

    Raises:
        FootageError: no photo or clip, a file that cannot be read, or a split without footage.
    """
    source, folder = Path(source), Path(folder)
    if not source.is_dir():
        raise FootageError(f"{source}: is no folder; give one of photos and clips")
    files = _files(source)
    if not files:
        raise FootageError(f"{source}: holds no photo ({' '.join(PHOTOS)}) or clip "
                           f"({' '.join(CLIPS)}); give a folder that does")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    listed = read_heldout(source)
    entries: dict[str, list[dict[str, object]]] = {split: [] for split in SPLITS}
    work = partial(_prepare_file, source=source, folder=folder, side=min(height, width), fps=fps)
    for done, (file, levels) in enumerate(
        zip(files, map_in_order(work, files, workers), strict=True), 1
    ):
        kind = "photo" if file.suffix.lower() in PHOTOS else "clip"
        entry: dict[str, object] = {"name": file.name, "kind": kind, "levels": levels}
        entries["heldout" if is_heldout(file.name, listed) else "train"].append(entry)
        on_file(done, len(files))
    (folder / INDEX).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return {split: Footage(folder, split) for split in SPLITS}


def names_by_split(source: str | Path) -> dict[str, list[str]]:
    """The photos and clips in a folder by the split they belong to; none is opened."""
    listed = read_heldout(Path(source))
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for file in _files(Path(source)):
        names["heldout" if is_heldout(file.name, listed) else "train"].append(file.name)
    return names


def footage_hash(source: str | Path) -> str:
    """SHA-256 over names and bytes of a folder's photos and clips: what a dataset was made from."""
    digest = hashlib.sha256()
    for file in _files(Path(source)):
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def _files(source: Path) -> list[Path]:
    return sorted(file for file in source.rglob("*") if file.suffix.lower() in PHOTOS + CLIPS)


def read_heldout(source: Path) -> frozenset[str] | None:
    """The names in a footage folder's list of what is held out; None without such a list."""
    path = source / HELDOUT_LIST
    if not path.is_file():
        return None
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return frozenset(line for line in lines if line)


def _prepare_file(file: Path, *, source: Path, folder: Path, side: int, fps: float) -> list[str]:
    """Write a file's pyramid; the names of its levels."""
    photo = file.suffix.lower() in PHOTOS
    frames = _photo(file, side) if photo else _clip(file, side, fps)
    # By its place: two cameras' folders may both hold an IMG_1.jpg.
    stem = hashlib.sha256(file.relative_to(source).as_posix().encode()).hexdigest()[:16]
    names: list[str] = []
    while True:
        names.append(f"{stem}-{len(names)}.npy")
        np.save(folder / names[-1], frames)
        if min(frames.shape[1:3]) < 2 * max(side // 2, SMALLEST_SIDE):
            return names
        frames = _halved(frames)


def _photo(file: Path, side: int) -> np.ndarray:
    try:
        with Image.open(file) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise FootageError(f"{file}: cannot be read as a photo ({error}); take it out") from error
    scale = ZOOM["photo"] * side / min(picture.size)
    if scale < 1:
        size = tuple(max(1, round(length * scale)) for length in picture.size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    return np.asarray(picture)[None]


def _clip(file: Path, side: int, fps: float) -> np.ndarray:
    try:
        info = probe(file)
        scale = min(1.0, ZOOM["clip"] * side / min(info.height, info.width))
        size = (2 * round(info.height * scale / 2), 2 * round(info.width * scale / 2))
        most = int(CLIP_SECONDS * fps)
        return np.stack(list(read_frames(file, fps=fps, size=size, count=most)))
    except VideoError as error:
        raise FootageError(f"{error}; take it out of the footage") from error


def _halved(frames: np.ndarray) -> np.ndarray:
    """[F, h, w, 3] -> [F, h // 2, w // 2, 3], each pixel the mean of four."""
    height, width = (length // 2 * 2 for length in frames.shape[1:3])
    rows = frames[:, 0:height:2].astype(np.uint16) + frames[:, 1:height:2]
    return ((rows[:, :, 0:width:2] + rows[:, :, 1:width:2] + 2) // 4).astype(np.uint8)


@cache
def _mapped(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")
