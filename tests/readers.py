"""Small, randomly initialised, genuine transformers models of every kind that relevance reads, with inputs."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import nn

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PICTURE = {"image_size": 16, "patch_size": 4}
WORDS = 40


def _pixels(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _ids(n: int, length: int = 5) -> torch.Tensor:
    ids = torch.randint(3, WORDS - 1, (n, length), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = WORDS - 1
    return ids


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


def _regions(n: int) -> torch.Tensor:
    return torch.randn(n, 4, 12, generator=torch.Generator().manual_seed(3))


def tiny(kind: str, n: int = 2) -> tuple[nn.Module, dict[str, Any], Any]:
    """(model, inputs for ``n`` samples, target) of one kind; weights depend on the kind only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(kind, n)


def _build(kind: str, n: int) -> tuple[nn.Module, dict[str, Any], Any]:
    if kind in ("vit", "deit", "dinov2"):
        config, cls = {
            "vit": (t.ViTConfig, t.ViTForImageClassification),
            "deit": (t.DeiTConfig, t.DeiTForImageClassification),
            "dinov2": (t.Dinov2Config, t.Dinov2ForImageClassification),
        }[kind]
        model = _lively(cls(config(num_labels=3, **SMALL, **PICTURE)))
        return model, {"pixel_values": _pixels(n)}, lambda out: out.logits[:, 1]
    if kind in ("clip", "siglip"):
        text = {"vocab_size": WORDS, "eos_token_id": WORDS - 1, "bos_token_id": 0, "pad_token_id": 1, **SMALL}
        config = {"clip": t.CLIPConfig, "siglip": t.SiglipConfig}[kind](
            text_config=text, vision_config={**SMALL, **PICTURE}, **({"projection_dim": 8} if kind == "clip" else {})
        )
        model = _lively({"clip": t.CLIPModel, "siglip": t.SiglipModel}[kind](config))
        return model, {"pixel_values": _pixels(n), "input_ids": _ids(n)}, lambda out: out.logits_per_image.diagonal()
    if kind == "bert":
        model = _lively(t.BertForSequenceClassification(t.BertConfig(vocab_size=WORDS, **SMALL)))
        return (
            model,
            {"input_ids": _ids(n), "attention_mask": _ones(n, 5)},
            lambda out: out.logits[:, 1],
        )
    if kind == "visual_bert":
        config = t.VisualBertConfig(vocab_size=WORDS, visual_embedding_dim=12, num_labels=5, **SMALL)
        seen = {"visual_embeds": _regions(n), "visual_attention_mask": torch.ones(n, 4)}
        seen["visual_token_type_ids"] = torch.ones(n, 4, dtype=torch.long)
        inputs = {"input_ids": _ids(n), "attention_mask": _ones(n, 5), **seen}
        return _lively(t.VisualBertForQuestionAnswering(config)), inputs, lambda out: out.logits[:, 2]
    if kind == "lxmert":
        config = t.LxmertConfig(
            vocab_size=WORDS, l_layers=2, r_layers=1, x_layers=2, num_qa_labels=5, visual_feat_dim=12,
            **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"},
        )  # fmt: skip
        places = torch.rand(n, 4, 4, generator=torch.Generator().manual_seed(4))
        inputs = {
            "input_ids": _ids(n),
            "attention_mask": _ones(n, 5),
            "visual_feats": _regions(n),
        }
        model = _lively(t.LxmertForQuestionAnswering(config))
        return model, {**inputs, "visual_pos": places}, lambda out: out.question_answering_score[:, 2]
    if kind == "detr":
        backbone = t.ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1, out_features=["stage1"])
        config = t.DetrConfig(
            backbone_config=backbone, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_queries=3, num_labels=4,
        )  # fmt: skip
        model = _lively(t.DetrForObjectDetection(config))
        return model, {"pixel_values": _pixels(n)}, lambda out: out.logits[:, 1, 2]
    if kind == "t5":
        config = t.T5Config(
            vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        inputs = {"input_ids": _ids(n), "decoder_input_ids": _ids(n, 3)}
        return _lively(t.T5ForConditionalGeneration(config)), inputs, lambda out: out.logits[:, -1, 7]
    raise ValueError(kind)


KINDS = ("vit", "deit", "dinov2", "clip", "siglip", "bert", "visual_bert", "lxmert", "detr", "t5")


def _lively(model: nn.Module) -> nn.Module:
    """Larger query and key weights: at initialisation attention is almost uniform and hides mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.is_floating_point():
            with torch.no_grad():
                parameter.mul_(6 if any(k in name for k in ("query", "key", "q_proj", "k_proj", ".q.", ".k.")) else 2)
    return model.eval()
