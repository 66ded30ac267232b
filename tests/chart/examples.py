"""The examples of the chart, and their rendered output, which is part of the repository."""

import functools
import pathlib
import subprocess

import yaml

CHART = pathlib.Path(__file__).resolve().parents[2] / "helm"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
RENDERED = CHART / "examples" / "rendered"
HEAD = "# helm template overfill helm --namespace overfill --values helm/examples/{}\n"
# Both ends of what is supported. Examples are written out for the newest.
OLDEST, NEWEST = "1.31.0", "1.37.0"


class Helm:
    """A real Helm program."""

    def __init__(self, program):
        self.program = str(program)

    def run(self, *arguments, check=True, **more):
        result = subprocess.run([self.program, *map(str, arguments)], capture_output=True, text=True, **more)
        if check and result.returncode != 0:
            raise AssertionError(f"helm {' '.join(map(str, arguments))}:\n{result.stderr}")
        return result

    @functools.lru_cache(maxsize=256)
    def text(self, *arguments, release="overfill", namespace="overfill", version=NEWEST, chart=CHART):
        return self.run(
            "template", release, chart, "--namespace", namespace, "--kube-version", version, *arguments
        ).stdout

    def objects(self, *arguments, **more):
        """Rendered objects, sorted by kind and name."""
        return load(self.text(*arguments, **more))


def load(text):
    objects = [each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each]
    return sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))


def rendered(helm, example):
    """What is committed for an example. Sorted and written by one library, so that no version of Helm matters."""
    objects = helm.objects("--values", example)
    return HEAD.format(example.name) + yaml.dump_all(
        objects, Dumper=yaml.CSafeDumper, sort_keys=False, width=120, explicit_start=True
    )


def write(program):
    RENDERED.mkdir(exist_ok=True)
    for old in RENDERED.glob("*.yaml"):
        old.unlink()
    for example in EXAMPLES:
        (RENDERED / example.name).write_text(rendered(Helm(program), example))
