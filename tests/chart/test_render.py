"""Every example, with every Helm, against the oldest and the newest Kubernetes."""

import pytest

import kube
from examples import CHART, EXAMPLES, NEWEST, OLDEST, RENDERED, load, rendered

IDS = [example.stem for example in EXAMPLES]


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_rendered_output_is_up_to_date(helm, example):
    committed = (RENDERED / example.name).read_text()
    assert committed == rendered(helm, example), "run `cargo xtask chart generate` and look at the difference"


def test_every_rendered_file_has_an_example():
    assert {path.name for path in RENDERED.glob("*")} == {path.name for path in EXAMPLES}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_example_is_valid(helm, example, version):
    kube.validate(helm.objects("--values", example, version=version), version)


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_example_passes_lint(helm, example):
    helm.run("lint", "--strict", "--values", example, CHART)


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_no_line_is_left_ragged(helm4, example):
    text = helm4.text("--values", example)
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    assert "<no value>" not in text and "%!" not in text


def test_chart_needs_no_values(helm):
    objects = helm.objects()
    kube.validate(objects, NEWEST)
    assert kube.env(objects, "Deployment", "overfill-prefill-default")["OVERFILL_MODEL"].startswith(
        "/usr/share/overfill"
    )


def test_package_holds_no_examples(helm, tmp_path):
    helm.run("package", CHART, "--destination", tmp_path)
    archive = next(tmp_path.glob("*.tgz"))
    assert load(helm.text(chart=archive)) == helm.objects()
    import tarfile

    names = tarfile.open(archive).getnames()
    assert "overfill/values.schema.json" in names
    assert not [name for name in names if "examples" in name]


def test_old_kubernetes_is_refused(helm):
    result = helm.run("template", "x", CHART, "--kube-version", "1.29.9", check=False)
    assert result.returncode != 0 and "incompatible with Kubernetes" in result.stderr


def test_chart_works_inside_another_chart(helm, tmp_path):
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "overfill").symlink_to(CHART)
    (tmp_path / "Chart.yaml").write_text(
        "apiVersion: v2\nname: parent\nversion: 1.0.0\n"
        "dependencies:\n- {name: overfill, version: '*', condition: overfill.enabled}\n"
    )
    (tmp_path / "values.yaml").write_text(
        "global: {imageRegistry: mirror.example.com, other: 1}\noverfill: {enabled: true, router: {replicas: 2}}\n"
    )
    objects = helm.objects(chart=tmp_path)
    router = kube.named(objects, "Deployment", "overfill-router")
    assert router["spec"]["replicas"] == 2
    assert router["spec"]["template"]["spec"]["containers"][0]["image"].startswith("mirror.example.com/overfill/")


def test_both_helms_make_the_same_objects(helm, helm4):
    for example in EXAMPLES:
        assert helm.objects("--values", example) == helm4.objects("--values", example)
