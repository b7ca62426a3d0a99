"""Publishing: the checks before the merge, the uploaded files, and that no token is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import LOCAL, Commands, cache_tokenizer, config_data, refused, write_config
from world import World

from raymerge.errors import RunError, UserError
from raymerge.runs import model_card as card
from raymerge.runs import publish as hub
from raymerge.runs.publish import push, require_target


class Hub:
    """Stands in for ``HfApi``."""

    def __init__(self) -> None:
        self.known: Any = {"name": "me", "orgs": [{"name": "lab"}], "auth": {}}
        self.fails: Exception | None = None
        self.sent: list[Any] = []

    def whoami(self) -> Any:
        if isinstance(self.known, Exception):
            raise self.known
        return self.known

    def create_repo(self, name: str, **given: Any) -> str:
        self.sent.append((name, given))
        return f"https://hub/{name}"

    def upload_folder(self, **given: Any) -> None:
        if self.fails:
            raise self.fails
        folder = Path(given["folder_path"])
        files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        self.sent.append({**given, "files": files})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Hub:
    api = Hub()
    monkeypatch.setattr(hub, "_api", lambda: api)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    return api


@pytest.mark.parametrize("name", ["me/model", "lab/model-1.0_x"])
def test_a_valid_target_is_accepted(api: Hub, name: str) -> None:
    require_target(name)
    assert api.sent == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model", "is not a repository name; write ORG/NAME"),
        ("me/a b", "is not a repository name"),
        ("me/../x", "is not a repository name"),
        ("other/model", "me is not a member of other; push to one of me, lab"),
    ],
)
def test_an_invalid_target_is_refused(api: Hub, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        require_target(name)


def test_a_read_only_token_is_refused(api: Hub) -> None:
    api.known["auth"] = {"accessToken": {"role": "read"}}
    with pytest.raises(UserError, match="is read-only; set HF_TOKEN"):
        require_target("me/model")


def test_a_missing_token_is_refused_and_no_token_is_printed(api: Hub) -> None:
    api.known = OSError("401 for https://hub/api?token=hf_s3cr3t with hf_s3cr3t")
    with pytest.raises(UserError, match=r"does not know you .*set HF_TOKEN") as caught:
        require_target("me/model")
    assert "hf_s3cr3t" not in str(caught.value)


def test_a_failed_upload_says_how_to_repeat_it(api: Hub, tmp_path: Path) -> None:
    api.fails = OSError("503 hf_s3cr3t")
    with pytest.raises(
        RunError, match=r"is written, but was not uploaded to me/m .*--resume to upload"
    ) as caught:
        push(tmp_path, "me/m", private=True)
    assert "hf_s3cr3t" not in str(caught.value)


def test_merge_and_publish(
    api: Hub,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache_tokenizer(monkeypatch)
    raymerge = Commands(capsys)
    given = {"license": "mit", "authors": ["Ada", "Emmy"]}
    config = write_config(tmp_path / "c.yaml", config_data(world, card=given, cluster=dict(LOCAL)))
    out = tmp_path / "out"
    refused(raymerge("merge", config, "--output", out, "--push-to-hub", "no/m"), "not a member")
    assert not out.exists()
    ran = raymerge.ok("merge", config, "--output", out, "--push-to-hub", "me/m", "--private")
    assert ran.out.endswith("published as https://hub/me/m\n")
    created, sent = api.sent
    assert created == ("me/m", {"private": True, "exist_ok": True})
    assert Path(sent["folder_path"]).name == "out"
    assert {"README.md", "config.yaml", "open_clip_model.safetensors"} <= sent["files"]
    assert (out / "state").is_dir()
    assert not any(name.startswith(("state", ".")) for name in sent["files"])
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit"
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert [row["dataset"]["name"] for row in front["model-index"][0]["results"]] == [
        task["name"] for task in world.config["tasks"]
    ]
    assert "Merged by Ada, Emmy." in text
    assert "mean λ" in text


def test_the_front_matter_is_what_the_hub_reads(world: World) -> None:
    from huggingface_hub import ModelCardData

    config = world.parse(Path("out"), card={"license": "apache-2.0"})
    front = card._front(config, {})
    assert ModelCardData(**front).to_dict()["license"] == "apache-2.0"


def test_base_models_are_those_of_the_hub(world: World) -> None:
    tasks = [dict(task) for task in world.config["tasks"]]
    tasks[0]["checkpoint"] = "hf://lab/expert@main/model.safetensors"
    tasks[1]["checkpoint"] = "hf-hub:lab/other"
    tasks[2]["checkpoint"] = "hf://datasets/lab/files/model.safetensors"
    config = world.parse(tasks=tasks, model={"arch": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"})
    assert card.hub_models(config) == [
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "lab/expert",
        "lab/other",
    ]
