"""merge_module: the CLIP merges' maths on any module."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from world import World

import raymerge
from raymerge.data.decoding import decode_all
from raymerge.data.preprocess import make_preprocess
from raymerge.data.sources import unlabeled_images
from raymerge.errors import UserError
from raymerge.models.heads import zero_shot_head
from raymerge.models.resolve import resolve_model

TASKS = ("one", "two", "three")
ENTROPY = {"objective": "entropy"}
COSINE = {**ENTROPY, "oracle": "cosine"}
DOCS = Path(__file__).parents[2] / "docs" / "modules.md"


class Classifier(nn.Module):
    """A module with a buffer that is merged, one that is not, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight
        self.heads = nn.ModuleDict({task: nn.Linear(11, 3) for task in TASKS})

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.norm(self.embed(tokens).mean(1)))))


def logits(model: nn.Module, batch: Tensor, task: str) -> Tensor:
    return model.heads[task](model(batch))


def backbone(name: str) -> bool:
    return not name.startswith("heads.")


@pytest.fixture
def models() -> tuple[Classifier, dict[str, Classifier]]:
    torch.manual_seed(3)
    model = Classifier().eval()
    experts = {}
    for task in TASKS:
        experts[task] = Classifier().eval()
        state = {
            k: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t + 1
            for k, t in model.state_dict().items()
        }
        state["out.weight"] = state["embed.weight"]
        experts[task].load_state_dict(state)
    return model, experts


@pytest.fixture
def batches() -> dict[str, list[Tensor]]:
    torch.manual_seed(4)
    return {task: [torch.randint(11, (5, 4)) for _ in range(3)] for task in TASKS}


def test_task_arithmetic_is_its_formula_and_leaves_the_rest(models) -> None:
    model, experts = models
    before = {k: t.clone() for k, t in model.state_dict().items()}
    method = {"name": "task_arithmetic", "scaling": 0.25}
    result = raymerge.merge_module(model, experts, method, merged=backbone)
    for name, base in before.items():
        assert torch.equal(model.state_dict()[name], base), "the user's module was changed"
        merged = result.state_dict[name]
        if name.startswith("heads.") or not base.is_floating_point():
            assert torch.equal(merged, base), name
        else:
            vectors = sum(expert.state_dict()[name] - base for expert in experts.values())
            torch.testing.assert_close(merged, base + 0.25 * vectors, rtol=0, atol=1e-6)
    assert result.lambdas.shape == (3, 1)
    assert torch.equal(result.state_dict["embed.weight"], result.state_dict["out.weight"])


def test_files_state_dicts_and_modules_are_the_same(models, tmp_path: Path) -> None:
    model, experts = models
    state = {k: t.clone() for k, t in experts["two"].state_dict().items()}
    save_file(state, tmp_path / "two.safetensors")
    torch.save(experts["three"].state_dict(), tmp_path / "three.pt")
    stored = {
        "one": experts["one"].state_dict(),
        "two": tmp_path / "two.safetensors",
        "three": str(tmp_path / "three.pt"),
    }
    one = raymerge.merge_module(model, experts, "ties")
    other = raymerge.merge_module(model, stored, "ties")
    for name, tensor in one.state_dict.items():
        assert torch.equal(tensor, other.state_dict[name]), name


def test_an_expert_in_training_code_is_found_and_the_choice_is_said(
    models, tmp_path: Path, caplog
) -> None:
    model, experts = models
    plain = raymerge.merge_module(model, experts, "average").state_dict
    first, other = next(iter(experts)), next(reversed(experts.values()))
    state = {f"_orig_mod.{key}": each for key, each in experts[first].state_dict().items()}
    torch.save({"ema": other.state_dict(), "net": state, "epoch": 2}, tmp_path / "x.pt")
    wrapped = raymerge.merge_module(
        model, {**experts, first: tmp_path / "x.pt"}, "average"
    ).state_dict
    assert all(torch.equal(wrapped[key], each) for key, each in plain.items())
    assert "x.pt the model under net._orig_mod.* is taken; it also holds ema.*" in caplog.text


@pytest.mark.parametrize("name", ["average", "dare", "tsv", "iso_c", "iso_cts", "wudi", "swudi"])
def test_every_method_without_data_changes_every_matrix(models, name: str) -> None:
    model, experts = models
    method = {"name": "wudi", "iterations": 3} if name == "wudi" else name
    result = raymerge.merge_module(model, experts, method)
    for key in ("embed.weight", "hidden.weight", "norm.running_mean"):
        assert not torch.equal(result.state_dict[key], model.state_dict()[key]), key
        assert torch.isfinite(result.state_dict[key]).all()


@pytest.mark.parametrize("objective", ["entropy", "kl", "infomax"])
def test_a_step_goes_along_the_gradient_through_the_merge(models, batches, objective) -> None:
    """The first Adam step is lr · sign(∂ℒ/∂λ), here by autograd through an explicit merge."""
    model, experts = models
    one = {task: each[:1] for task, each in batches.items()}
    method = {"name": "adamerging", "objective": objective, "temperature": 2.0, "clamp": "none"}
    result = raymerge.merge_module(
        model, experts, method, batches=one, logits=logits, merged=backbone,
        optimizer={"steps": 1, "lr": 0.01, "eps": 1e-12},
    )  # fmt: skip
    lambdas = torch.full((3, len(result.layers)), 0.3, requires_grad=True)
    base = model.state_dict()
    theta = {
        name: base[name]
        + sum(
            lambdas[k, i] * (experts[t].state_dict()[name] - base[name])
            for k, t in enumerate(TASKS)
        )
        for i, name in enumerate(result.layers)
    }
    buffers = {name for name, _ in model.named_buffers()}  # merged, but nothing learns from them
    theta = {name: t.detach() if name in buffers else t for name, t in theta.items()}
    theta["out.weight"] = theta["embed.weight"]
    loss = torch.zeros(())
    for task in TASKS:

        class Bound(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self, batch: Tensor, task: str) -> Tensor:
                return logits(self.inner, batch, task)

        named = {f"inner.{k}": t for k, t in theta.items()}
        out = functional_call(Bound(), named, (one[task][0], task))
        if objective == "kl":
            teacher = experts[task](one[task][0]) @ model.heads[task].weight.t()
            q = ((teacher + model.heads[task].bias) / 2).softmax(1).detach()
            loss = loss + 4 * (q * (q.log() - (out / 2).log_softmax(1))).sum(1).mean()
        else:  # infomax has no running mean before the first step
            loss = loss - (out.softmax(1) * out.log_softmax(1)).sum(1).mean()
    loss.backward()
    moved = result.lambdas - 0.3
    torch.testing.assert_close(moved, -0.01 * lambdas.grad.sign().double(), rtol=0, atol=1e-6)
    assert float(result.records[0].loss) == pytest.approx(loss.item(), rel=1e-4)


def test_actors_learn_the_same(models, batches, local_ray) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import it
    model, experts = models
    options = {
        "batches": batches,
        "logits": logits,
        "merged": backbone,
        "optimizer": {"steps": 4, "lr": 0.05},
    }
    here = raymerge.merge_module(model, experts, {"name": "adamerging"}, **options)
    there = raymerge.merge_module(model, experts, {"name": "adamerging"}, workers=2, **options)
    torch.testing.assert_close(here.lambdas, there.lambdas, rtol=0, atol=1e-6)
    assert len(there.records) == 4


@pytest.mark.faults
def test_a_worker_that_dies_is_restarted_and_its_step_repeated(
    models, batches, local_ray, tmp_path: Path
) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    model, experts = models
    driver, mark = os.getpid(), tmp_path / "killed"

    def deadly(model: nn.Module, batch: Tensor, task: str) -> Tensor:
        if task == "two" and os.getpid() != driver and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return logits(model, batch, task)

    options = {"batches": batches, "merged": backbone, "optimizer": {"steps": 3, "lr": 0.05}}
    calm = raymerge.merge_module(model, experts, logits=logits, workers=2, **options)
    struck = raymerge.merge_module(model, experts, logits=deadly, workers=2, **options)
    assert torch.equal(struck.lambdas, calm.lambdas)
    assert [incident.kind for incident in struck.incidents] == ["worker"]
    assert mark.exists()
    assert calm.incidents == ()


def test_fisher_weighs_the_experts_by_their_own_information(models, batches) -> None:
    """F = Σ_c p_c (∂ log p_c)² per row, here by autograd on each expert itself."""
    model, experts = models
    method = {"name": "fisher", "samples": "exact", "images": 3}
    result = raymerge.merge_module(
        model, experts, method, batches=batches, logits=logits, merged=backbone
    )
    layers = [name for name in model.state_dict() if name in dict(model.named_parameters())]
    layers = [name for name in layers if backbone(name)]
    weighted = dict.fromkeys(layers, 0.0)
    weights = dict.fromkeys(layers, 0.0)
    fishers = []
    for task in TASKS:
        expert = experts[task]
        expert.heads.load_state_dict(model.heads.state_dict())  # the tasks' heads are not merged
        named = {k: p for k, p in expert.named_parameters() if k in layers}
        rows = torch.cat([logits(expert, batch, task) for batch in batches[task]])
        fisher = {name: torch.zeros_like(p) for name, p in named.items()}
        for log_p in rows.log_softmax(1):
            for value in log_p:
                slopes = torch.autograd.grad(value, list(named.values()), retain_graph=True)
                for name, slope in zip(named, slopes, strict=True):
                    fisher[name] += value.exp().detach() * slope.square() / len(rows)
        fishers.append(fisher)
    base = model.state_dict()
    for task, fisher in zip(TASKS, fishers, strict=True):
        norm = torch.sqrt(sum(f.square().sum() for f in fisher.values()))
        for name in layers:
            weight = (fisher[name] + 1e-6) / (norm + 1e-6)
            weighted[name] += weight * (experts[task].state_dict()[name] - base[name])
            weights[name] += weight
    for name in layers:
        expected = base[name] + weighted[name] / weights[name]
        torch.testing.assert_close(result.state_dict[name], expected, rtol=1e-3, atol=1e-5)
    assert result.lambdas.shape == (1, 1)


@pytest.mark.parametrize("name", ["fw_hard", "fw_soft"])
@pytest.mark.parametrize("oracle", ["inner", "cosine"])
def test_frank_wolfe_lowers_the_entropy_of_any_module(models, batches, name, oracle) -> None:
    model, experts = models
    method = {"name": name, "objective": "entropy", "oracle": oracle, "iterations": 4, "images": 3}
    result = raymerge.merge_module(
        model, experts, method, batches=batches, logits=logits, merged=backbone,
        optimizer={"steps": 3, "lr": 0.05},
    )  # fmt: skip
    assert len(result.records) == 4
    assert result.lambdas.abs().max() > 0.01
    assert result.records[-1].loss < result.records[0].loss


def test_a_clip_model_gets_the_lambda_of_the_clip_merge(world: World, tmp_path: Path) -> None:
    import open_clip

    config = world.parse(tmp_path / "out", optimizer={"batch_size": 12, "steps": 3})
    expected = raymerge.merge(config)
    model = open_clip.create_model(resolve_model(config.model).name).eval()
    tokenizer = open_clip.get_tokenizer(resolve_model(config.model).tokenizer)
    preprocess = make_preprocess(model.visual)
    pixels, heads = {}, {}
    for task in config.tasks:
        items = unlabeled_images(str(task.adapt), "adapt").items
        pixels[task.name] = [preprocess.normalise(decode_all(items, preprocess))]
        heads[task.name] = zero_shot_head(model, tokenizer, task.classnames, task.templates)

    def clip_logits(tower: nn.Module, batch: Tensor, task: str) -> Tensor:
        return nn.functional.normalize(tower(batch), dim=-1) @ heads[task]

    result = raymerge.merge_module(
        model.visual, {task.name: str(task.checkpoint) for task in config.tasks},
        config.method, batches=pixels, logits=clip_logits, optimizer=config.optimizer,
    )  # fmt: skip
    assert result.layers == expected.layers
    torch.testing.assert_close(result.lambdas, expected.lambdas, rtol=0, atol=1e-5)


def test_the_documented_example_learns() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(code, str(DOCS), "exec"), names)
    accuracy, encoder = names["accuracy"], names["encoder"]
    merged = names["encoder_of_all"]
    assert callable(accuracy)
    assert accuracy(merged) > accuracy(encoder) + 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "tise"}, "method"),
        ({"method": "regmean"}, "regmean solves for the linear layers of open_clip's"),
        ({"method": "zero_shot"}, "zero_shot does not merge the experts"),
        ({"method": "fw_hard"}, "cross_entropy needs labels"),
        (
            {"method": {"name": "fw_hard", "objective": "entropy", "start": "x"}},
            "method.start: merge_module cannot start from",
        ),
        ({"method": {**COSINE, "name": "fw_soft"}, "workers": 2}, "use workers: 1 or 0"),
        ({"method": "fisher", "batches": None}, "; give batches and logits"),
        ({"method": {"name": "adamerging", "objective": "cross_entropy"}}, "needs labels"),
        ({"batches": None}, "; give batches and logits"),
        ({"batches": {"one": []}}, "batches: none for 'one'"),
        ({"experts": {}}, "experts is empty; give at least one"),
        ({"experts": [{}]}, "experts must be a mapping .*, got a list"),
        ({"merged": lambda name: False}, "no floating-point tensor"),
        (
            {"logits": lambda model, batch, task: torch.zeros(5)},
            r"logits of task 'one' must be .*, got shape \[5\]",
        ),
        ({"logits": lambda model, batch, task: torch.zeros(5, 3)}, "do not depend on"),
        ({"optimizer": {"stepz": 3}}, "stepz"),
        (
            {"optimizer": {"nonfinite": "skip"}, "method": {"name": "fw_soft", **ENTROPY}},
            "nonfinite: skip is not for fw_soft",
        ),
        ({"batches": {key: [torch.zeros(0, 4).long()] for key in TASKS}}, "'one': one has no rows"),
    ],
)
def test_wrong_input_is_one_line(models, batches, change, message: str) -> None:
    model, experts = models
    arguments = {
        "model": model,
        "experts": experts,
        "method": "adamerging",
        "batches": batches,
        "logits": logits,
        "merged": backbone,
        **change,
    }
    with pytest.raises(UserError, match=message) as caught:
        raymerge.merge_module(**arguments)
    assert "\n" not in str(caught.value)


def test_a_damaged_expert_is_found_before_any_worker_starts(models, batches, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("a worker started")

    monkeypatch.setattr("raymerge.runs.merge_module.LocalGroup", fail)
    model, experts = models
    state = experts["two"].state_dict()
    state["hidden.weight"] = torch.full((6, 6), torch.nan)
    damaged = {**experts, "two": state}
    for method in ("adamerging", "fisher"):
        with pytest.raises(UserError, match=r"experts\['two'\]: .*hidden.weight"):
            raymerge.merge_module(
                model, damaged, method, batches=batches, logits=logits, merged=backbone
            )


def test_an_expert_of_another_shape_is_refused(models) -> None:
    model, experts = models
    state = experts["two"].state_dict()
    state["hidden.weight"] = torch.zeros(6, 7)
    with pytest.raises(UserError, match=r"hidden.weight has shape \[6, 7\]"):
        raymerge.merge_module(model, {**experts, "two": state}, "average")
    del state["hidden.weight"]
    with pytest.raises(UserError, match="1 missing"):
        raymerge.merge_module(model, {**experts, "two": state}, "average")
