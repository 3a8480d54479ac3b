"""Architectures of the `transformers` library at tiny random configurations; nothing is downloaded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Inputs = tuple[Tensor, ...]


class Adapter(nn.Module):
    """A library model that takes tensors by position and gives one tensor."""

    def __init__(self, model: nn.Module, arguments: tuple[str, ...], answer: str, options: dict[str, Any]):
        super().__init__()
        self.model, self.arguments, self.answer, self.options = model, arguments, answer, options

    def forward(self, *inputs: Tensor) -> Tensor:
        answer: Tensor = self.model(**dict(zip(self.arguments, inputs, strict=True)), **self.options)[self.answer]
        return answer


def _library(
    model: str, config: str, arguments: str = "pixel_values", answer: str = "logits", cache: bool | None = None, **settings: Any
) -> Callable[[], nn.Module]:
    """A function that makes ``transformers.<model>(transformers.<config>(**settings))``; ``cache=False`` where it has one."""

    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        inner = getattr(library, model)(getattr(library, config)(**settings))
        return Adapter(inner, tuple(arguments.split()), answer, {} if cache is None else {"use_cache": cache})

    return make


def _tokens(*lengths: int) -> Callable[[], Inputs]:
    return lambda: tuple(torch.randint(3, 99, (2, n)) for n in lengths)


def _image() -> Inputs:
    return (torch.randn(2, 3, 64, 64),)


def _sound() -> Inputs:
    return (torch.randn(2, 1600),)


_TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
_SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "conv_dim": [16] * 7,
    "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16, "classifier_proj_size": 16,
}  # fmt: skip
_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_EVEN = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def _classifier(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return _library(f"{name}ForImageClassification", f"{name}Config", **settings)


def _reader(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return _library(f"{name}ForSequenceClassification", f"{name}Config", "input_ids", **{**_TEXT, **settings})


def _writer(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return _library(f"{name}ForCausalLM", f"{name}Config", "input_ids", cache=False, **{**_TEXT, **settings})


TABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "bert": (_reader("Bert"), _tokens(12)),
    "roberta": (_reader("Roberta"), _tokens(12)),
    "albert": (_reader("Albert", embedding_size=16), _tokens(12)),
    "electra": (_reader("Electra", embedding_size=16), _tokens(12)),
    "mobilebert": (_reader("MobileBert", embedding_size=32, intra_bottleneck_size=16), _tokens(12)),
    "deberta-v2": (_reader("DebertaV2", relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]), _tokens(12)),
    "distilbert": (
        _library(
            "DistilBertForSequenceClassification", "DistilBertConfig", "input_ids",
            vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48,
        ),
        _tokens(12),
    ),
    "gpt2": (
        _library(
            "GPT2LMHeadModel", "GPT2Config", "input_ids", cache=False,
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        ),
        _tokens(12),
    ),
    "gpt-neox": (_writer("GPTNeoX"), _tokens(12)),
    "opt": (
        _library(
            "OPTForCausalLM", "OPTConfig", "input_ids", cache=False, vocab_size=99, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32,
        ),
        _tokens(12),
    ),
    "llama": (_writer("Llama", num_key_value_heads=2), _tokens(12)),
    "qwen2": (_writer("Qwen2", num_key_value_heads=2, tie_word_embeddings=True), _tokens(12)),
    "mistral": (_writer("Mistral", num_key_value_heads=2, sliding_window=8), _tokens(12)),
    "t5": (
        _library(
            "T5ForConditionalGeneration", "T5Config", "input_ids decoder_input_ids", cache=False,
            vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        ),
        _tokens(12, 7),
    ),
    "bart": (
        _library(
            "BartForConditionalGeneration", "BartConfig", "input_ids decoder_input_ids", cache=False, vocab_size=99, d_model=32,
            encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=64,
        ),
        _tokens(12, 7),
    ),
    "whisper": (
        _library(
            "WhisperForConditionalGeneration", "WhisperConfig", "input_features decoder_input_ids", cache=False, vocab_size=99,
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=20, max_target_positions=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        lambda: (torch.randn(2, 16, 40), torch.randint(3, 99, (2, 7))),
    ),
    "wav2vec2": (_library("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", "input_values", **_SPEECH), _sound),
    "hubert": (_library("HubertForSequenceClassification", "HubertConfig", "input_values", **_SPEECH), _sound),
    "vit": (_classifier("ViT", **_VIT), _image),
    "deit": (_classifier("DeiT", **_VIT), _image),
    "beit": (_classifier("Beit", use_relative_position_bias=True, **_VIT), _image),
    "dinov2": (_classifier("Dinov2", mlp_ratio=2, **{k: v for k, v in _VIT.items() if k != "intermediate_size"}), _image),
    "clip-vision": (_library("CLIPVisionModel", "CLIPVisionConfig", answer="pooler_output", **_VIT), _image),
    "yolos": (
        _library("YolosForObjectDetection", "YolosConfig", num_detection_tokens=6, **{**_VIT, "image_size": [64, 64]}),
        _image,
    ),
    "swin": (_classifier("Swin", **_SWIN), _image),
    "swin-v2": (_classifier("Swinv2", **_SWIN), _image),
    "convnext": (_classifier("ConvNext", **_STAGES), _image),
    "convnext-v2": (_classifier("ConvNextV2", **_STAGES), _image),
    "poolformer": (_classifier("PoolFormer", **_EVEN), _image),
    "pvt": (_classifier("Pvt", image_size=64, num_attention_heads=[1, 2, 3, 4], **_EVEN), _image),
    "segformer": (
        _library(
            "SegformerForSemanticSegmentation", "SegformerConfig", num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=32, **_EVEN,
        ),
        _image,
    ),
    "levit": (
        _classifier(
            "Levit", image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8]
        ),
        _image,
    ),
    "cvt": (_classifier("Cvt", embed_dim=[8, 16, 32], depth=[1, 2, 3], num_heads=[1, 2, 4]), _image),
    "mobilevit": (
        _classifier(
            "MobileViT", image_size=64, patch_size=2, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
            num_attention_heads=4,
        ),
        _image,
    ),
    "mobilevit-v2": (_classifier("MobileViTV2", image_size=64, width_multiplier=0.25), _image),
    "resnet": (_classifier("ResNet", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]), _image),
    "regnet": (
        _classifier("RegNet", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], groups_width=8),
        _image,
    ),
    "efficientnet": (
        _classifier("EfficientNet", image_size=64, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320),
        _image,
    ),
    "hf-mobilenet-v1": (
        _classifier("MobileNetV1", depth_multiplier=0.25, image_size=64, min_depth=8, classifier_dropout_prob=0.1),
        _image,
    ),
    "hf-mobilenet-v2": (_classifier("MobileNetV2", depth_multiplier=0.25, image_size=64, min_depth=8), _image),
}  # fmt: skip
