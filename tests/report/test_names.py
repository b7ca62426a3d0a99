"""Names that people read."""

from __future__ import annotations

import pytest
from report_samples import dump, vit_layers

from raymerge.report.data import load_run
from raymerge.report.names import LayerGroup, layer_groups, method_title, run_title


@pytest.mark.parametrize(
    ("granularity", "task_vectors", "layers", "title"),
    [
        ("tensor", "raw", ["a", "b"], "AdaMerging (layer-wise)"),
        ("tensor", "ties", ["a", "b"], "AdaMerging++ (layer-wise)"),
        ("block", "raw", ["a", "b"], "AdaMerging (block-wise)"),
        ("task", "raw", ["all"], "AdaMerging (task-wise)"),
        ("task", "ties", ["all"], "AdaMerging++ (task-wise)"),
    ],
)
def test_a_run_is_named_by_granularity_and_task_vectors(
    tmp_path, granularity, task_vectors, layers, title
):
    dump(tmp_path / "results.json", {"method": "adamerging"})
    row = [0.3] * len(layers)
    dump(tmp_path / "lambdas.json", {"tasks": ["t"], "layers": layers, "values": [row]})
    config = f"method: {{granularity: {granularity}, task_vectors: {task_vectors}}}\n"
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    assert run_title(load_run(tmp_path)) == title


def test_an_unknown_method_keeps_its_name():
    assert method_title("my_own") == "my_own"


def test_layers_are_grouped_by_block_in_vit_resnet_and_block_names():
    groups = layer_groups(vit_layers(3))
    assert [group.label for group in groups] == ["pre", "0", "1", "2", "post"]
    assert groups[1] == LayerGroup(6, 18, "0")
    resnet = ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.x"]
    labels = [group.label for group in layer_groups(resnet)]
    assert labels == ["pre", "layer1.0", "layer1.1", "layer2.0"]
    blocks = ["embeddings", "transformer.resblocks.0", "transformer.resblocks.1", "proj"]
    assert [group.label for group in layer_groups(blocks)] == ["pre", "0", "1", "post"]


def test_groups_cover_every_layer_once():
    layers = vit_layers(24)
    groups = layer_groups(layers)
    columns = [column for group in groups for column in range(group.start, group.stop)]
    assert columns == list(range(len(layers)))
