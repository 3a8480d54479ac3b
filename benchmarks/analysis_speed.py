"""How long it takes to find out what can be pruned: labels on a traced graph, beside torch-pruning's dependency graph.

Four networks at full size with random weights: ResNet-50, DenseNet-121, ViT-B/16, BERT-base. Ours is `analyse` and
`channels_of` on a network that is traced already; theirs is `DependencyGraph().build_dependency`, which runs the model
once to trace it, and that is part of what it does. Turn by turn in one process, medians; seconds. Tracing with torch.export
comes once per network and is shown beside. The goal: under 5 s each on two cores, and no slower than torch-pruning.

    pip install torch-pruning==1.6.1 transformers
    python benchmarks/analysis_speed.py [--turns 5]
"""

import argparse
import importlib
import json
import os
import statistics
import time
import warnings

import torch
from torch import nn

from edgepress.compress.network import trace
from edgepress.compress.pruning import analyse, channels_of

GOAL_SECONDS = 5.0


class DenseLayer(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


def densenet121(growth=32):
    """Huang et al. 2017, https://arxiv.org/abs/1608.06993, table 1."""
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for block, depth in enumerate((6, 12, 24, 16)):
        if block:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(DenseLayer(channels, growth))
            channels += growth
    return nn.Sequential(
        *layers, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)
    )


class Library(nn.Module):
    """A model of the transformers library, by its and its configuration's name: one tensor in, one tensor out."""

    def __init__(self, model, configuration, **settings):
        super().__init__()
        library = importlib.import_module("transformers")
        self.model = getattr(library, model)(getattr(library, configuration)(**settings))

    def forward(self, x):
        return self.model(x).logits


def image():
    return torch.randn(1, 3, 224, 224)


def tokens():
    return torch.randint(0, 1000, (1, 128))


NETWORKS = {
    "ResNet-50": (lambda: Library("ResNetForImageClassification", "ResNetConfig", num_labels=1000), image),
    "DenseNet-121": (densenet121, image),
    "ViT-B/16": (lambda: Library("ViTForImageClassification", "ViTConfig", num_labels=1000), image),
    "BERT-base": (lambda: Library("BertForSequenceClassification", "BertConfig"), tokens),
}


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name, turns):
    peer = importlib.import_module("torch_pruning")
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    start = time.perf_counter()
    network = trace(model, x)
    tracing = time.perf_counter() - start
    ours, theirs = [], []
    for _ in range(turns):
        ours.append(timed(lambda: channels_of(analyse(network))))
        theirs.append(timed(lambda: peer.DependencyGraph().build_dependency(model, x)))
    channels = channels_of(analyse(network))
    return {
        "network": name,
        "edgepress_s": round(statistics.median(ours), 3),
        "torch_pruning_s": round(statistics.median(theirs), 3),
        "trace_s": round(tracing, 2),
        "groups": len(channels.groups),
        "channels": len(channels.classes),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    rows = []
    print(f"{'network':14s}{'edgepress':>11s}{'torch-pruning':>15s}{'ratio':>8s}{'tracing':>9s}{'groups':>8s}{'channels':>10s}")
    for name in options.networks:
        row = measure(name, options.turns)
        rows.append(row)
        print(
            f"{name:14s}{row['edgepress_s']:11.3f}{row['torch_pruning_s']:15.3f}"
            f"{row['torch_pruning_s'] / row['edgepress_s']:8.1f}{row['trace_s']:9.1f}{row['groups']:8d}{row['channels']:10d}"
        )
    met = all(r["edgepress_s"] <= min(GOAL_SECONDS, r["torch_pruning_s"]) for r in rows)
    print(json.dumps({"benchmark": "analysis_speed", "turns": options.turns, "goal_met": met, "networks": rows}))


if __name__ == "__main__":
    main()
