"""A stand-in for the Hugging Face hub: keeps what it is sent, and gives it back."""

from fnmatch import fnmatch
from pathlib import Path


class FakeHub:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.repositories, self.files, self.fails = {}, {}, None

    def whoami(self) -> dict:
        if self.fails == "token":
            raise OSError("Token is required\nand a second line")
        return {"name": "me"}

    def create_repo(self, repository, *, private, exist_ok):
        self.repositories[repository] = private
        return f"https://hub/{repository}"

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        if self.fails == "upload":
            raise RuntimeError("500 Server Error")
        for file in Path(folder_path).rglob("*"):
            if file.is_file() and file.name not in ignore_patterns:
                name = file.relative_to(folder_path).as_posix()
                self.files[f"{repo_id}/{name}"] = file.read_bytes()

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
        self.files[f"{repo_id}/{path_in_repo}"] = Path(path_or_fileobj).read_bytes()

    def snapshot(self, repository: str, cache: Path, patterns: list[str]) -> str:
        """What ``snapshot_download`` leaves in the hub's cache.

        Raises:
            OSError: There is no such repository.
        """
        if not any(name.startswith(f"{repository}/") for name in self.files):
            raise OSError(f"404 Client Error: {repository}")
        folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / "0123abc"
        for name, data in self.files.items():
            inside = name.removeprefix(f"{repository}/")
            if inside != name and any(fnmatch(inside, pattern) for pattern in patterns):
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                (folder / inside).write_bytes(data)
        return str(folder)
