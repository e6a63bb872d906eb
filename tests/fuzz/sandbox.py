"""A place where a case can do harm that is seen: folders of a person's own around the folder of its output."""

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

PRECIOUS = "somebody's own\n"
Snapshot = dict[str, tuple[int, ...]]


class Sandbox:
    """Home, working folder, temporary folder and cache of the cases, with files among them that are nobody's to touch.

    work: the working folder; inputs: what a case brings; out: the folder that holds outputs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home, self.temporary, self.cache = root / "home", root / "tmp", root / "cache"
        self.work = root / "some" / "where" / "deep" / "work"  # `../..` stays in the sandbox
        self.inputs, self.out = self.work / "in", self.work / "out"
        self.elsewhere = root / "elsewhere"

    def variables(self) -> dict[str, str]:
        """Return the variables of the environment that point into the sandbox."""
        return {
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": str(self.home / ".cache"),
            "ISD_RAY_CACHE": str(self.cache),
        }

    def fresh(self) -> None:
        """Lay everything out anew."""
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in (
            self.home,
            self.temporary,
            self.cache,
            self.inputs,
            self.out / "theirs",
            self.elsewhere,
        ):
            folder.mkdir(parents=True)
        for folder in (self.root, self.home, self.work, self.out, self.out / "theirs", self.elsewhere):
            (folder / "precious.txt").write_text(PRECIOUS)
        for folder in (self.work, self.out):
            (folder / "link").symlink_to(self.elsewhere)

    def snapshot(self, writes: Sequence[Path] = ()) -> Snapshot:
        """Return what lies in the sandbox, and at the top of the file system, but for the places that may be filled.

        The cache may be filled too; the temporary folder is to be left empty.
        """
        skipped = {str(place) for place in (*writes, self.cache)}
        found: Snapshot = {f"/{name}": () for name in os.listdir("/")}
        waiting = [str(self.root)]
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.path in skipped:
                        continue
                    told = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(told.st_mode):
                        found[entry.path] = (told.st_mode,)
                        waiting.append(entry.path)
                    else:
                        found[entry.path] = _told(told)
        return found

    def files(self, places: Sequence[Path]) -> Snapshot:
        """Return what files are, as a snapshot has them; those that are gone are left out."""
        return {str(place): _told(place.lstat()) for place in places if place.is_file()}

    def changes(self, before: Snapshot, after: Snapshot) -> list[str]:
        """Say what is new, gone or changed."""
        root = f"{self.root}/"
        said = [f"created {place.removeprefix(root)}" for place in after if place not in before]
        said += [f"removed {place.removeprefix(root)}" for place in before if place not in after]
        both = before.keys() & after.keys()
        return said + [
            f"changed {place.removeprefix(root)}" for place in both if before[place] != after[place]
        ]


def _told(file: os.stat_result) -> tuple[int, ...]:
    return file.st_mode, file.st_size, file.st_mtime_ns, file.st_ino


def put(source: Path, place: Path) -> Path:
    """Copy a file or folder to a place."""
    if source.is_dir():
        shutil.copytree(source, place, dirs_exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    return place
