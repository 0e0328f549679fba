"""toy-vqa: a small ``transformers.LxmertForQuestionAnswering`` (Tan & Bansal 2019) that answers toybox questions.

It sees what LXMERT sees: a question, and a few regions of the picture with their boxes. A region's feature is its own
pixels (:func:`sfumato.models.readers.regions.region_features`), so that nothing but the picture tells the answer. The
regions are the toys' boxes, somewhat displaced, and boxes of the background, in random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import BertTokenizer, LxmertConfig, LxmertForQuestionAnswering

from sfumato.models.readers.regions import box_overlap, region_features
from sfumato.toybox import ANSWERS, QUESTION_KINDS, Scene, ToyboxDataset, sample_question
from sfumato.toybox.questions import QUESTION_WORDS
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.objective import Objective
from sfumato.training.recipe import Section
from sfumato.zoo.objectives import labels
from sfumato.zoo.objectives.detr import ToyBoxes

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class VQAModelOptions(Section):
    """The ``[model]`` section."""

    width: int = 96
    heads: int = 4
    text_layers: int = 2
    region_layers: int = 2
    cross_layers: int = 2
    cells: int = Field(16, description="a region is resampled to cells x cells pixels")
    regions: int = Field(8, description="regions a picture is cut into")


class VQALoss(Section):
    """The ``[loss]`` section."""

    questions: int = Field(3, ge=1, description="questions per picture and step")
    kinds: list[str] = Field(list(QUESTION_KINDS), min_length=1, description="kinds drawn from; named twice: as often")
    places: float = Field(0.5, ge=0, description="weight of reading off each region which toy it shows")
    answers: Literal["one", "each"] = Field(
        "one",
        description="one: a softmax over the answers; each: binary cross-entropy of every answer by itself, as LXMERT",
    )
    displaced: float = Field(0.08, ge=0, description="largest displacement of a toy's box, in shares of its sides")


def question_tokenizer() -> BertTokenizer:
    """A ``BertTokenizer`` whose vocabulary is the words of toybox questions."""
    return BertTokenizer(
        vocab={word: i for i, word in enumerate((*SPECIAL, *QUESTION_WORDS))}, do_lower_case=True, model_max_length=20
    )


def draw_regions(boxes: Tensor, count: int, displaced: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Regions (count, 4) in random order and the toy in each (count,), -1 for background.

    ``boxes`` (n, 4) are displaced a little; the rest is drawn where no toy is. Shares of the picture, clipped to it.
    """
    side = boxes[:, 2:] - boxes[:, :2]
    shift = (2 * torch.rand(len(boxes), 4, generator=generator) - 1) * displaced * torch.cat([side, side], 1)
    tries = torch.rand(60, 4, generator=generator)
    size = 0.18 + 0.3 * tries[:, :2]
    corner = tries[:, 2:] * (1 - size)
    empty = torch.cat([corner, corner + size], 1)
    nearest = box_overlap(empty, boxes).amax(1) if len(boxes) else torch.zeros(60)
    empty = empty[torch.argsort((nearest > 0.25).float(), stable=True)][: count - len(boxes)]
    order = torch.randperm(count, generator=generator)
    regions = torch.cat([(boxes + shift).clamp(0, 1), empty])[order]
    owner = torch.cat([torch.arange(len(boxes)), torch.full((count - len(boxes),), -1)])[order]
    return regions, owner


def region_labels(scene: Scene, owner: Tensor) -> Tensor:
    """Class of each region (n, 3) by shape, colour and pattern, 0 for background."""
    out = torch.zeros(len(owner), len(labels.PLACES), dtype=torch.long)
    for row, toy in zip(out, owner.tolist(), strict=True):
        if toy >= 0:
            named = [words.index(getattr(scene.toys[toy], name)) for name, words in labels.PLACES.items()]
            row.copy_(torch.tensor(named) + 1)
    return out


class VQAObjective(Objective):
    """Cross-entropy of the answer, and of what each region shows (read off by a head that is thrown away)."""

    NAME = "vqa"
    EXPORTED = "vqa"
    Model: ClassVar[type[Section]] = VQAModelOptions
    Loss: ClassVar[type[Section]] = VQALoss
    vqa: LxmertForQuestionAnswering

    def build(self) -> dict[str, nn.Module]:
        o: VQAModelOptions = self.model_options
        self.tokenizer = question_tokenizer()
        config = LxmertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=o.width,
            num_attention_heads=o.heads,
            intermediate_size=4 * o.width,
            l_layers=o.text_layers,
            r_layers=o.region_layers,
            x_layers=o.cross_layers,
            num_qa_labels=len(ANSWERS),
            visual_feat_dim=3 * o.cells * o.cells,
            max_position_embeddings=self.tokenizer.model_max_length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        config.id2label = dict(enumerate(ANSWERS))
        config.label2id = {answer: i for i, answer in enumerate(ANSWERS)}
        self.vqa = LxmertForQuestionAnswering(config)
        with torch.no_grad():  # boxes count from the centre: their layer norm keeps on which side one lies, not how far
            boxes = self.vqa.lxmert.encoder.visn_fc.box_fc
            boxes.bias.copy_(-boxes.weight.normal_().sum(1) / 2)
        return {"vqa": self.vqa, "readout": nn.Linear(o.width, labels.PLACE_CLASSES)}

    def open_data(self) -> None:
        super().open_data()
        self.boxes = ToyBoxes(self.train_data)
        self.val_boxes = ToyBoxes(self.val_data)

    def takes_muon(self, name: str, parameter: Tensor) -> bool:
        return super().takes_muon(name, parameter) and not any(n in name for n in ("visn_fc", "box_fc", "logit_fc.3"))

    def _regions(self, source: ToyboxDataset, boxes: Sequence[Tensor], i: int, seed: int) -> tuple[Tensor, Tensor]:
        o: VQAModelOptions = self.model_options
        generator = torch.Generator().manual_seed(seed)
        visible_boxes = boxes[i][~boxes[i].isnan().any(1)]
        regions, owner = draw_regions(visible_boxes, o.regions, self.loss_options.displaced, generator)
        visible = torch.arange(len(boxes[i]))[~boxes[i].isnan().any(1)]
        return regions, torch.where(owner >= 0, visible[owner] if len(visible) else owner, owner)

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        loss: VQALoss = self.loss_options
        indices = draw.indices(len(self.train_data), self.recipe.train.batch)
        texts, answers, regions, classes = [], [], [], []
        for i in indices.tolist():
            boxes, owner = self._regions(self.train_data, self.boxes, i, draw.number("regions", i))
            scene, rng = self.train_data.scenes[i], np.random.default_rng(draw.number("question", i))
            questions = [sample_question(scene, rng, loss.kinds) for _ in range(loss.questions)]
            texts += [question.text for question in questions]
            answers += [ANSWERS.index(question.answer) for question in questions]
            regions.append(boxes)
            classes.append(region_labels(scene, owner))
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        return {
            "pixels": data.pictures(self.train_data, indices),
            "regions": torch.stack(regions),
            "classes": torch.stack(classes),
            "tokens": tokens.input_ids,
            "mask": tokens.attention_mask,
            "answers": torch.tensor(answers),
        }

    def answer(self, pixels: Tensor, regions: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Answer scores (b, answers) and features of the regions after their own layers (b, n, width)."""
        features = region_features(pixels, regions, self.model_options.cells)
        times = len(tokens) // len(pixels)
        features, regions = features.repeat_interleave(times, 0), regions.repeat_interleave(times, 0)
        out = self.vqa(
            input_ids=tokens,
            attention_mask=mask,
            visual_feats=features,
            visual_pos=regions,
            output_hidden_states=True,
        )
        return out.question_answering_score.float(), out.vision_hidden_states[self.model_options.region_layers - 1]

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        o: VQALoss = self.loss_options
        scores, hidden = self.answer(batch["pixels"], batch["regions"], batch["tokens"], batch["mask"])
        if o.answers == "each":  # summed: the loss does not shrink as answers are added
            target = F.one_hot(batch["answers"], scores.shape[1]).float()
            loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none").sum(1).mean()
        else:
            loss = F.cross_entropy(scores, batch["answers"])
        logs = {"right": (scores.detach().argmax(1) == batch["answers"]).float().mean()}
        if o.places:
            read = self.modules["readout"](hidden[:: o.questions]).float()
            start = 0
            for column, words in enumerate(labels.PLACES.values()):
                part = read[..., start : start + len(words) + 1].flatten(0, 1)
                loss = loss + o.places * F.cross_entropy(part, batch["classes"][..., column].flatten())
                start += len(words) + 1
        return loss, logs

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of right answers on held-out scenes, by kind of question (one of each kind a scene allows)."""
        right: dict[str, list[bool]] = {kind: [] for kind in QUESTION_KINDS}
        for part in torch.arange(len(self.val_data)).split(100):
            questions, rows, regions = [], [], []
            for row, i in enumerate(part.tolist()):
                rng = np.random.default_rng(i)
                regions.append(self._regions(self.val_data, self.val_boxes, i, i)[0])
                for kind in QUESTION_KINDS:
                    question = sample_question(self.val_data.scenes[i], rng, [kind, "count"])
                    if question.kind == kind:  # not every kind can be asked of every scene
                        questions.append(question)
                        rows.append(row)
            tokens = self.tokenizer([question.text for question in questions], padding=True, return_tensors="pt")
            scores, _ = self.answer(
                data.pictures(self.val_data, part)[rows].to(self.device),
                torch.stack(regions)[rows].to(self.device),
                tokens.input_ids.to(self.device),
                tokens.attention_mask.to(self.device),
            )
            for question, best in zip(questions, scores.argmax(1).tolist(), strict=True):
                right[question.kind].append(ANSWERS[best] == question.answer)
        out = {f"right_{kind}": float(np.mean(values)) for kind, values in right.items() if values}
        return {"right": float(np.mean([value for values in right.values() for value in values])), **out}

    def processors(self) -> list[Any]:
        return [self.tokenizer]

    def export(self, folder: Path) -> dict[str, Any]:
        return {**super().export(folder), "regions": self.model_options.regions, "answers": list(ANSWERS)}
