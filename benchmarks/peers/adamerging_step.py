"""Run steps of the official layer-wise AdaMerging, in its own loop, on a case.

    python adamerging_step.py --case CASE --repo AdaMerging --steps 5 --out lambdas.npz

The official code is a script that loads files of its authors' machine when imported. This adapter
therefore parses its source and executes, unchanged, its definitions, the lines that build the model
and the optimiser, and its loop over epochs. Replaced are the images (one batch of each task a step,
where its loop draws two) and ``Tensor.cuda``, which does nothing, as the measurement is on a CPU.
The clock starts when the loop asks for the first task's data set and stops when it prints λ.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peer
import torch
from torch import Tensor, nn

SETUP = {
    "pretrained_model_dic",
    "model",
    "names",
    "paramslist",
    "adamerging_mtl_model",
    "optimizer",
}


def main() -> None:
    args = peer.step_arguments(__doc__.splitlines()[0]).parse_args()
    if args.steps >= 500:
        raise SystemExit("--steps must be below 500: there the official loop evaluates")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.Tensor.cuda = lambda self, *_: self
    with contextlib.redirect_stdout(sys.stderr):
        run(args)


def run(args: argparse.Namespace) -> None:
    pixels, heads = peer.load_inputs(args.case)
    clock = peer.Clock(args.pause)
    scope = make_scope(args, pixels, heads, clock)
    tree = ast.parse((args.repo / "src" / "main_layer_wise_adamerging.py").read_text())
    execute(tree, is_setup, scope)
    for group in scope["optimizer"].param_groups:
        group["lr"] = args.lr
    names = [name.removeprefix("model.visual.") for name in scope["names"]]
    check_order(names, scope["task_vectors"])
    execute(tree, is_epoch_loop, scope)
    lambdas_KL = scope["adamerging_mtl_model"].lambdas()[:, 1:].T
    peer.report("AdaMerging", args, clock, lambdas_KL, names, len(pixels[0]))


def is_setup(node: ast.stmt) -> bool:
    """Return True for definitions and for assignments to the names in ``SETUP``."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return True
    if not isinstance(node, (ast.Assign, ast.AugAssign)):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return bool(names & SETUP)


def is_epoch_loop(node: ast.stmt) -> bool:
    return isinstance(node, ast.For) and ast.unparse(node.target) == "epoch"


def execute(tree: ast.Module, keep: Callable[[ast.stmt], bool], scope: dict[str, Any]) -> None:
    """Run the top-level statements that ``keep`` chooses, in their order."""
    chosen = [node for node in tree.body if keep(node)]
    exec(
        compile(ast.Module(chosen, type_ignores=[]), "main_layer_wise_adamerging.py", "exec"), scope
    )


def make_scope(
    args: argparse.Namespace, pixels: list[Tensor], heads: list[Tensor], clock: peer.Clock
) -> dict[str, Any]:
    """Return the names that the official lines expect from its imports and from lines left out."""
    tasks = [f"task{k}" for k in range(len(pixels))]
    head_class = official_head(args.repo)
    classify = {t: head_class(True, head_DC.T) for t, head_DC in zip(tasks, heads, strict=True)}
    images = dict(zip(tasks, pixels, strict=True))

    def get_dataset(name: str, *_: object, **__: object) -> dict[str, Tensor]:
        if name == tasks[0]:
            clock.start()
        return {"images": images[name], "labels": torch.zeros(0)}

    return {
        "torch": torch,
        "args": SimpleNamespace(device="cpu", data_location=""),
        "exam_datasets": tasks,
        "epochs": args.steps,
        "pretrained_model": Encoder(peer.load_visual(args.case, peer.pretrained_file(args.case))),
        "task_vectors": task_vectors(args.case, len(tasks)),
        "get_classification_head": lambda _, name: classify[name],
        "get_dataset": get_dataset,
        "get_dataloader_shuffle": lambda dataset: [dataset],
        "maybe_dictionarize": lambda batch: batch,
        "tqdm": SimpleNamespace(tqdm=lambda batches: batches),
        "print": lambda *_: clock.stop(),
    }


class Encoder(nn.Module):
    """The official ``ImageEncoder`` with the visual tower only.

    The official loop merges the text tensors too, but their task vectors are zero.
    """

    val_preprocess = None

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)


def official_head(repo: Path) -> type[nn.Module]:
    tree = ast.parse((repo / "src" / "modeling.py").read_text())
    scope: dict[str, Any] = {"torch": torch}
    execute(tree, lambda node: getattr(node, "name", "") == "ClassificationHead", scope)
    return scope["ClassificationHead"]


def task_vectors(case: Path, tasks: int) -> list[SimpleNamespace]:
    """Return every θ_k − θ₀ in the order of the visual tower's state dict."""
    pretrained = peer.visual_state(peer.pretrained_file(case))
    order = peer.empty_visual(case).state_dict()
    states = map(peer.visual_state, peer.expert_files(case, tasks))
    return [SimpleNamespace(vector={n: s[n] - pretrained[n] for n in order}) for s in states]


def check_order(names: list[str], vectors: list[SimpleNamespace]) -> None:
    """Raise SystemExit unless parameters and state dict pair up, as the official code assumes."""
    if any(list(v.vector) != names for v in vectors):
        raise SystemExit("the visual tower has buffers: parameters and state dict do not pair up")


if __name__ == "__main__":
    main()
