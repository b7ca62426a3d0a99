"""The model card: whose each file is, and names from files shown literally."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from commands import cache_tokenizer
from world import World

from raymerge.runs.merge import merge
from raymerge.runs.model_card import plain


def _card(world: World, output: Path, **changes: Any) -> str:
    merge(world.parse(output, method={"name": "average"}, **changes))
    return (output / "README.md").read_text()


def test_each_file_has_the_name_of_its_task(world: World, tmp_path: Path, monkeypatch: Any) -> None:
    """Downloads are often all called finetuned.safetensors."""
    cache_tokenizer(monkeypatch)
    tasks = [dict(task) for task in world.config["tasks"]]
    for task in tasks:
        own = tmp_path / task["name"] / "finetuned.safetensors"
        own.parent.mkdir()
        own.symlink_to(task["checkpoint"])
        task["checkpoint"] = str(own)
    card = _card(world, tmp_path / "out", tasks=tasks)
    for task in tasks:
        assert f"| {task['name']} | <code>finetuned.safetensors</code> |" in card
    assert "| pretrained | <code>open&#95;clip&#95;model.safetensors</code> |" in card


def test_a_file_name_is_no_markup(world: World, tmp_path: Path, monkeypatch: Any) -> None:
    cache_tokenizer(monkeypatch)
    odd = tmp_path / "<img src=x onerror=alert(1)>`|.safetensors"
    odd.symlink_to(world.config["tasks"][0]["checkpoint"])
    tasks = [dict(task) for task in world.config["tasks"]]
    tasks[0]["checkpoint"] = str(odd)
    card = _card(world, tmp_path / "out", tasks=tasks)
    assert "<img" not in card
    assert "&#60;img src=x onerror=alert(1)&#62;&#96;&#124;.safetensors" in card


def test_plain_text_is_left_alone():
    assert plain("ViT-B/32 (openai), 8 tasks") == "ViT-B/32 (openai), 8 tasks"
    assert plain("a\nb") == "a b"
