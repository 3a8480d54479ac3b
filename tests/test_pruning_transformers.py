"""Networks of the transformers library, tiny and with random weights: the mechanics that tests/nets.py has not."""

import os
import random
from functools import cache

import pytest
import torch
from torch import nn

from edgepress.compress.network import trace
from edgepress.compress.pruning import analyse, channels_of, inspect, masked, relative_error, remove

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TEXT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO_STAGES = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1, **TOKENS,
}  # fmt: skip


def words(*lengths):
    return lambda n: tuple(torch.randint(3, 40, (n, length)) for length in lengths)


def image(n):
    return (torch.randn(n, 3, 64, 64),)


def sound(n):
    return torch.randn(n, 16, 20), torch.randint(3, 40, (n, 5))


SEQUENCES = ("input_ids", "decoder_input_ids")
# name: (model, configuration, settings, names of the inputs, inputs, part of the multiply-accumulates that may be left)
TABLE = {
    "gather along relative positions": (
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], **TEXT},
        ("input_ids",), words(8), 0.4,
    ),
    "packed projection stored transposed": (
        "GPT2LMHeadModel", "GPT2Config", {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, **TOKENS},
        ("input_ids",), words(8), 0.4,
    ),
    "experts in a grouped product": (
        "MixtralForCausalLM", "MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 4, **TEXT, **TOKENS},
        ("input_ids",), words(8), 0.4,
    ),
    "one key head for all": (
        "FalconForCausalLM", "FalconConfig",
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "multi_query": True,
         "new_decoder_architecture": False, **TOKENS},
        ("input_ids",), words(8), 0.4,
    ),
    "encoder and decoder, biases by bucket": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        SEQUENCES, words(8, 5), 0.4,
    ),
    "positions computed without gradients": (
        "MarianMTModel", "MarianConfig", {**TWO_STAGES, "pad_token_id": 49, "max_position_embeddings": 32},
        SEQUENCES, words(8, 5), 0.4,
    ),
    "sound in, words out": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"num_mel_bins": 16, "max_source_positions": 10, "max_target_positions": 16, **TWO_STAGES},
        ("input_features", "decoder_input_ids"), sound, 0.4,
    ),
    "cosine attention in shifted windows": (
        "Swinv2ForImageClassification", "Swinv2Config",
        {"image_size": 64, "patch_size": 8, "embed_dim": 16, "depths": [2], "num_heads": [4], "window_size": 4},
        ("pixel_values",), image, 0.4,
    ),
    "unfolded and folded again": (
        "MobileViTV2ForImageClassification", "MobileViTV2Config",
        {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
        ("pixel_values",), image, 0.4,
    ),
    "batch norms and biases in attention": (
        "LevitForImageClassification", "LevitConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1] * 3, "key_dim": [8] * 3},
        ("pixel_values",), image, 0.4,
    ),
    "responses normalised over the image": (
        "ConvNextV2ForImageClassification", "ConvNextV2Config", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        ("pixel_values",), image, 0.4,
    ),
    "standardised weights": (
        "BitForImageClassification", "BitConfig",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8}, ("pixel_values",), image, 0.6,
    ),
}  # fmt: skip


class Logits(nn.Module):
    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names
        self.options = {"use_cache": False} if "input_ids" in names or "decoder_input_ids" in names else {}

    def forward(self, *inputs):
        return self.model(**dict(zip(self.names, inputs, strict=True)), **self.options).logits


@cache
def traced(name):
    transformers = pytest.importorskip("transformers")
    model, config, settings, names, inputs, _ = TABLE[name]
    torch.manual_seed(0)
    network = Logits(getattr(transformers, model)(getattr(transformers, config)(**settings)), names).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # many start as 0 or 1, or too small for anything to show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return trace(network, inputs(2)).eval()


def half(channels, seed):
    draw = random.Random(seed)
    return [c for g in channels.groups for c in draw.sample(g.channels.tolist(), min(len(g.channels) // 2, len(g.channels) - 1))]


@pytest.mark.parametrize("name", TABLE)
def test_pruned_transformer_must_match_its_oracle_and_train(name):
    network, inputs, most = traced(name), TABLE[name][4], TABLE[name][5]
    analysis = analyse(network)
    channels = channels_of(analysis)
    gone = half(channels, 0)
    smaller = remove(network, analysis, gone)
    assert smaller.macs() < most * network.macs()
    x = inputs(3)
    with torch.no_grad():
        answer = smaller(*x)
        assert relative_error(answer, masked(analysis, gone)(*x)) < 1e-5
        assert relative_error(answer, masked(analysis, half(channels, 1))(*x)) > 1e-3
        assert smaller(*inputs(1)).shape[0] == 1
    smaller.train()
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.01)
    smaller(*x).square().mean().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in smaller.parameters())


def test_what_freezes_must_be_shown_with_the_line_of_the_librarys_model():
    found = inspect(traced("positions computed without gradients"))
    lines = [f.line for f in found.frozen if f.operator == "embedding"]
    assert lines
    assert all("modeling_marian.py, line " in line for line in lines)
