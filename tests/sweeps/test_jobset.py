"""JobSets: as they were written before, and as Kubernetes' own schema wants them."""

import json
import pathlib

import pytest
import yaml

from common.errors import UserError
from sweeps import cells, driver, jobs
from sweeps.cells import Cell
from sweeps.driver import drive
from sweeps.engine import Resources
from sweeps.engines.jobset import JobSet

DATA = pathlib.Path(__file__).parent / "data"
OPTIONS = {"image": "europe-docker.pkg.dev/mine/mixology:1", "mount": "/mnt/sweeps", "bucket": "my-sweeps"}
CASES = {
    "tpu": (
        Resources(hosts=4, accelerators="tpu-v6e-slice:4", minutes=240),
        {**OPTIONS, "topology": "4x4", "queue": "tpus", "namespace": "research", "account": "trainer"},
    ),
    "gpu": (Resources(hosts=2, accelerators="nvidia-h100-80gb:8"), {**OPTIONS, "cpu": "64", "memory": "400Gi"}),
    "cpu": (
        Resources(),
        {"image": "mixology:1", "mount": "/mnt/sweeps", "claim": "nfs", "code": "/app", "python": "python3"},
    ),
}


@pytest.fixture
def place(monkeypatch):
    """A cell that lies where the pods see it, whatever this machine has."""
    monkeypatch.setattr("sweeps.engines.jobset.passed_environment", lambda: {"MIXOLOGY_CACHE": "/mnt/sweeps/cache"})
    monkeypatch.setattr(cells, "load", lambda path: Cell({}, (), path, {}))
    return pathlib.Path("/mnt/sweeps/lr sweep/mixer=gla,optimizer.learning_rate=0.001,seed=0")


@pytest.mark.parametrize("case", CASES)
def test_golden(case, place):
    """If what is written changes on purpose, look at the difference and write the file anew: delete it, and run this twice."""
    resources, options = CASES[case]
    found = yaml.safe_dump(JobSet(place.parent, resources, options).jobset(place, 2), sort_keys=False, width=120)
    file = DATA / f"jobset_{case}.yaml"
    if not file.exists():
        file.write_text(found)
        pytest.fail(f"{file} is written: look at it")
    assert found == file.read_text()


def closed(schema):
    """The schema with no room for what it does not name, as `kubectl apply` validates."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        made["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize("case", CASES)
def test_schema(case, place):
    """That of the JobSet project: its CRD of v1alpha2 (commit 08dfbdf), without descriptions and status."""
    validation = pytest.importorskip("jsonschema", reason="pip install -r requirements-dev.txt")
    schema = closed(json.loads((DATA / "jobset.schema.json").read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    resources, options = CASES[case]
    made = JobSet(place.parent, resources, options).jobset(place, 2)
    validation.validate(made, schema)
    name = made["metadata"]["name"]
    assert len(f"{name}-cell-0-0-abcde") <= 63 and name == name.lower() and name[0].isalpha()
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["backoffLimits"] = 0
    with pytest.raises(validation.ValidationError, match="backoffLimits"):
        validation.validate(made, schema)


@pytest.mark.parametrize(
    "resources, options, message",
    [
        ({}, {"image": "x"}, "needs --option mount="),
        ({}, {"image": "x", "mount": "/mnt/sweeps"}, "either --option bucket=NAME or claim=NAME"),
        ({}, {**OPTIONS, "claim": "nfs"}, "either --option bucket=NAME or claim=NAME"),
        ({}, {**OPTIONS, "mount": "/mnt/other"}, "is not in mount=/mnt/other"),
        ({}, {**OPTIONS, "imge": "x"}, "no option imge; did you mean 'image'"),
    ],
)
def test_what_it_needs(resources, options, message):
    with pytest.raises(UserError, match=message):
        JobSet(pathlib.Path("/mnt/sweeps/a"), Resources(**resources), options)


def test_what_is_left_is_written(tmp_path):
    """Each time; what has failed is told once before it is written again. The directory alone says how cells are."""
    grid = [Cell({}, (), tmp_path / name, {"train": {"steps": 3}}) for name in "ab"]
    for cell in grid:
        cell.save()
    engine = JobSet(tmp_path, options={**OPTIONS, "mount": str(tmp_path)})

    def written():
        return [one["metadata"]["name"] for one in yaml.safe_load_all((tmp_path / "jobset.yaml").read_text())]

    assert list(drive(engine, grid)) == [] and len(written()) == 2
    assert all(driver.status(cell).startswith("queued (jobset ") for cell in grid)
    first = written()
    with jobs.attempt(grid[0].workdir) as record:
        record |= {"status": "failed", "error": "no such corpus"}
    (outcome,) = drive(engine, grid)
    assert outcome.error == "no such corpus" and written() == first[1:]
    assert list(drive(engine, grid)) == [] and written() == first
