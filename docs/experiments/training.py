"""Trains small binary networks in many ways: the figures of the page "Training a binary network".

``python docs/experiments/training.py`` runs everything (15 minutes on one core), writes ``training.json`` beside this
file and the tables of ``docs/training.md``; ``--missing`` trains only what the JSON that is there lacks, and
``--tables`` only writes the tables from it. It needs scikit-learn and no network: one data set comes with scikit-learn,
the other is generated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits, make_classification
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from bitorch_qlinear import QLinear, pack

HERE = Path(__file__).parent
RESULTS = HERE / "training.json"
PAGE = HERE.parent / "training.md"
SEEDS = 5
EPOCHS = {"digits": 30, "table": 15}
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to build and train a network; the defaults are what the page recommends.

    Attributes:
        threshold: The gradient cancellation threshold of the binary layers.
        optimizer: "adam", "sgd" (with momentum 0.9) or "adamw" (weight decay 0.01).
        rate: The learning rate, or its peak with a schedule.
        schedule: "cosine" lets the rate fall to 0, "constant" keeps it.
        between: What lies between two layers: "norm", "none", "norm, relu" or "relu, norm".
        binary: Which layers are binary: "hidden", "hidden and first", "hidden and last", "all" or "none".
        norm_at_end: Whether a BatchNorm follows the last layer.
        hidden: Width of the hidden layers.
        quantization: Of the input and the weights.
        scale: The weight scale of the binary layers.
    """

    threshold: float | None = 1.0
    optimizer: str = "adam"
    rate: float = 1e-2
    schedule: str = "cosine"
    between: str = "norm"
    binary: str = "hidden"
    norm_at_end: bool = False
    hidden: int = 256
    quantization: str = "sign"
    scale: Literal["mean", "learned"] | None = None


BASE = Recipe()
FLOAT = Recipe(binary="none", between="norm, relu")


def change(**changes: Any) -> Recipe:
    """The recommended recipe with some things changed."""
    return dataclasses.replace(BASE, **changes)


RATES = (1e-4, 1e-3, 1e-2, 1e-1)
# Tables of the page: the name of the block, the header of the first column, and a recipe for each row.
TABLES: dict[str, tuple[str, dict[str, Recipe]]] = {
    "cost": (
        "network",
        {
            f"{kind}, {width} wide": dataclasses.replace(recipe, hidden=width)
            for width in (64, 256, 512)
            for kind, recipe in (("float, ReLU", FLOAT), ("binary hidden layers", BASE))
        },
    ),
    "threshold": (
        "threshold, Adam's learning rate",
        {
            f"{threshold}, {rate:g}": change(threshold=threshold, rate=rate)
            for rate in (1e-3, 1e-2)
            for threshold in (None, 0.5, 1.0, 2.0)
        },
    ),
    "optimizer": (
        "optimizer, learning rate",
        {
            f"{name}, {rate:g}": change(optimizer=optimizer, rate=rate)
            for optimizer, name in (("adam", "Adam"), ("sgd", "SGD with momentum 0.9"))
            for rate in RATES
        }
        | {"AdamW with weight decay 0.01, 0.01": change(optimizer="adamw")}
        | {"Adam, 0.01 without a schedule": change(schedule="constant")},
    ),
    "norm": (
        "between two layers",
        {
            "BatchNorm": BASE,
            "nothing": change(between="none"),
            "BatchNorm, then ReLU": change(between="norm, relu"),
            "ReLU, then BatchNorm": change(between="relu, norm"),
        },
    ),
    "layers": (
        "binary layers",
        {
            "hidden ones only": BASE,
            "hidden and first": change(binary="hidden and first"),
            "hidden and last": change(binary="hidden and last"),
            "hidden and last, a BatchNorm behind the last": change(binary="hidden and last", norm_at_end=True),
            "all": change(binary="all"),
            "all, a BatchNorm behind the last": change(binary="all", norm_at_end=True),
        },
    ),
    "quantization": (
        "quantization of input and weights",
        {name: change(quantization=name) for name in ("sign", "approxsign", "swishsign", "steheaviside")}
        | {
            f"{name}, threshold None": change(quantization=name, threshold=None) for name in ("approxsign", "swishsign")
        },
    ),
    "scale": (
        "where, weight scale",
        {
            f"{where}, {scale}": change(**changes, scale=scale)
            for where, changes in (("hidden layers without BatchNorm", {"between": "none"}),)
            for scale in (None, "mean", "learned")
        },
    ),
}


def load(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and labels, test inputs and labels; the inputs are standardized by the training set's figures.

    Args:
        name: "digits", 1797 images of 8 × 8 pixels that scikit-learn has, or "table": 12,000 generated rows of 54
            numbers in 7 classes of 4 clusters each; 2 % of the labels are drawn at random.
        seed: Decides which rows are the test set.
    """
    if name == "digits":
        x, y = load_digits(return_X_y=True)
    else:
        x, y = make_classification(
            12000,
            54,
            n_informative=16,
            n_redundant=8,
            n_classes=7,
            n_clusters_per_class=4,
            class_sep=2.0,
            flip_y=0.02,
            random_state=0,
        )
    parts = train_test_split(x, y, test_size=0.25, stratify=y, random_state=seed)
    x_train, x_test, y_train, y_test = (torch.tensor(part) for part in parts)
    mean, deviation = x_train.mean(0), x_train.std(0) + 1e-3
    x_train, x_test = ((part - mean) / deviation for part in (x_train, x_test))
    return x_train.float(), y_train.long(), x_test.float(), y_test.long()


def build(recipe: Recipe, features: int, classes: int) -> nn.Sequential:
    """A first layer, two hidden ones and a last one."""
    sizes = [features, recipe.hidden, recipe.hidden, recipe.hidden, classes]
    names = ["first", "hidden", "hidden", "last"]
    modules: list[nn.Module] = []
    for name, k, n in zip(names, sizes[:-1], sizes[1:], strict=True):
        if recipe.binary == "all" or name in recipe.binary:
            quantization = {"input_quantization": recipe.quantization, "weight_quantization": recipe.quantization}
            options = {"gradient_cancellation_threshold": recipe.threshold, "weight_scale": recipe.scale}
            modules.append(QLinear(k, n, **quantization, **options))
        else:
            modules.append(nn.Linear(k, n))
        if name != "last":
            kinds = {"norm": [nn.BatchNorm1d(n)], "relu": [nn.ReLU()], "none": []}
            for kind in recipe.between.split(", "):
                modules += kinds[kind]
    if recipe.norm_at_end:
        modules.append(nn.BatchNorm1d(classes))
    return nn.Sequential(*modules)


def optimizer_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer for the model."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), recipe.rate, momentum=0.9)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=0.01)
    return torch.optim.Adam(model.parameters(), recipe.rate)


def signs(model: nn.Module) -> Tensor:
    """The signs of all binary weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, QLinear)]
    return torch.cat([layer.weight.detach().flatten() < 0 for layer in layers] or [torch.empty(0, dtype=torch.bool)])


def train(recipe: Recipe, data: str, seed: int) -> dict[str, Any]:
    """Train once.

    Returns:
        The test accuracy after the last epoch, the loss and the share of binary weights that changed their sign in each
        epoch, and the seconds.
    """
    x_train, y_train, x_test, y_test = load(data, seed)
    torch.manual_seed(seed)
    start = time.perf_counter()
    model = build(recipe, x_train.shape[1], int(y_train.max()) + 1)
    optimizer = optimizer_of(recipe, model)
    steps = EPOCHS[data] * (len(x_train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, flips = [], []
    for _ in range(EPOCHS[data]):
        before, total = signs(model), 0.0
        order = torch.randperm(len(x_train))
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model(x_train[chosen]), y_train[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if recipe.schedule == "cosine":
                schedule.step()
            total += loss.item()
        losses.append(round(total / (len(order) // BATCH), 5))
        flips.append(round((signs(model) != before).float().mean().item(), 6) if len(before) else 0.0)
    model.eval()
    with torch.inference_mode():
        logits = model(x_test)
        if len(signs(model)):
            assert torch.equal(pack(model)(x_test), logits)  # the packed model computes the same bits
    correct = (logits.argmax(1) == y_test).float().mean().item()
    seconds = time.perf_counter() - start
    return {"accuracy": round(correct, 6), "loss": losses, "flips": flips, "seconds": round(seconds, 2)}


def measure(known: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Train every recipe of every table with every seed on both data sets, each of them once.

    Args:
        known: Figures of an earlier run; what they have is not trained again.

    Yields:
        The figures so far, after each recipe.
    """
    torch.set_num_threads(1)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    setting = {"processor": processor(), "torch": torch.__version__, "threads": 1, "commit": git.stdout.strip()}
    figures: dict[str, Any] = known or {"setting": setting, "seeds": SEEDS, "epochs": EPOCHS, "results": []}
    recipes = {recipe for _, rows in TABLES.values() for recipe in rows.values()}
    recipes -= {recipe_of(result) for result in figures["results"]}
    if known and recipes and setting not in known.setdefault("later", []):
        known["later"].append(setting)
    for number, recipe in enumerate(sorted(recipes, key=repr)):
        for data in EPOCHS:
            results = [train(recipe, data, seed) for seed in range(SEEDS)]
            figures["results"].append({"recipe": dataclasses.asdict(recipe), "data": data, "runs": results})
        last = figures["results"][-2:]
        print(f"{number + 1} of {len(recipes)}: {[summary(result) for result in last]} {recipe}", flush=True)
        yield figures


def processor() -> str:
    """The processor's name, family and model, as Linux knows them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def summary(result: dict[str, Any]) -> str:
    """The median accuracy, and the least and the greatest."""
    values = sorted(100 * run["accuracy"] for run in result["runs"])
    return f"{statistics.median(values):.1f} % ({values[0]:.1f} to {values[-1]:.1f})"


def recipe_of(result: dict[str, Any]) -> Recipe:
    """The recipe of a result; what is younger than the result has its default."""
    return Recipe(**result["recipe"])


def found(figures: dict[str, Any], recipe: Recipe, data: str) -> dict[str, Any]:
    """The result of a recipe on a data set."""
    for result in figures["results"]:
        if recipe_of(result) == recipe and result["data"] == data:
            return result  # type: ignore[no-any-return]
    raise LookupError(f"training.json has no result of {recipe} on {data}: run this program without --tables")


def table(figures: dict[str, Any], header: str, rows: dict[str, Recipe]) -> str:
    """A Markdown table with a row for each recipe and a column for each data set."""
    lines = [f"| {header} | digits | table |", "| --- | --- | --- |"]
    for name, recipe in rows.items():
        shown = f"**{name}**" if recipe == BASE else name
        cells = [summary(found(figures, recipe, data)) for data in ("digits", "table")]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def flip_table(figures: dict[str, Any]) -> str:
    """Loss and changed signs of the recommended recipe, and of one whose rate is too small."""
    rows = {"0.01": BASE, "0.0001": change(rate=1e-4)}
    results = {name: found(figures, recipe, "table")["runs"] for name, recipe in rows.items()}
    columns = [f"{what}, rate {name}" for name in rows for what in ("loss", "signs changed")]
    lines = [f"| epoch | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for epoch in (1, 2, 4, 8, 12, 15):
        cells = []
        for runs in results.values():
            cells.append(f"{statistics.median(run['loss'][epoch - 1] for run in runs):.2f}")
            cells.append(f"{100 * statistics.median(run['flips'][epoch - 1] for run in runs):.2f} %")
        lines.append(f"| {epoch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def blocks(figures: dict[str, Any]) -> dict[str, str]:
    """The text of each block of the page, by its name."""
    setting = figures["setting"]
    texts = {name: table(figures, header, rows) for name, (header, rows) in TABLES.items()}
    texts["flips"] = flip_table(figures)
    texts["setting"] = (
        f"Measured by `docs/experiments/training.py` on one thread of an {setting['processor']}, "
        f"torch {setting['torch']}, commit {setting['commit']}, "
        f"{figures['seeds']} seeds, batches of {BATCH}, "
        f"{figures['epochs']['digits']} epochs of the digits and {figures['epochs']['table']} of the table."
    )
    for later in figures.get("later", []):
        texts["setting"] += (
            f" Rows that were added later: {later['processor']}, torch {later['torch']}, commit {later['commit']}."
        )
    return texts


def fill(text: str, figures: dict[str, Any]) -> str:
    """The page with the blocks' texts between their markers."""
    for name, content in blocks(figures).items():
        start, end = f"<!-- training {name} -->\n", f"<!-- /training {name} -->"
        head, _, rest = text.partition(start)
        _, found_end, tail = rest.partition(end)
        if not found_end:
            raise ValueError(f"{PAGE.name} has no block {name!r}")
        text = f"{head}{start}\n{content}\n\n{end}{tail}"
    return text


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write the tables from training.json, train nothing")
    parser.add_argument("--missing", action="store_true", help="train only what training.json lacks")
    asked = parser.parse_args()
    if not asked.tables:
        known = json.loads(RESULTS.read_text()) if asked.missing else None
        for figures in measure(known):
            RESULTS.write_text(json.dumps(figures) + "\n")
    if PAGE.exists():
        PAGE.write_text(fill(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
