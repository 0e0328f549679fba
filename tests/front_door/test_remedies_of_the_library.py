"""What errors of the library's own functions say would help, helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import sfumato
from sfumato import masks
from sfumato.adapters.metadata import BASE
from sfumato.bench.folder import Folder
from sfumato.bench.judge import read_attributes
from sfumato.explain.cnn_invariances.explorer import InvarianceExplorer
from sfumato.explain.daam import DAAM
from sfumato.explain.iin.sketches import drawn_in, inside_of
from sfumato.hspace.basis import Directions
from sfumato.judge.sad_pad import SadPad
from sfumato.models import quiet
from sfumato.models.nets.vector_ae import load_autoencoder
from sfumato.models.readers import load_clip
from sfumato.models.readers.noised import PLANES
from sfumato.models.text_towers import text_towers
from sfumato.relevance.lrp import lrp
from sfumato.teach.denoising import Denoising
from sfumato.teach.scorers import scorer_of
from sfumato.teach.taught import free
from sfumato.teach.word_vectors import refuse_word
from sfumato.training.losses import Noise
from sfumato.training.players import Player
from sfumato.training.trainer import Trainer
from sfumato.translation.networks import Network, network_of
from sfumato.translation.translator import FlowParams
from tests.front_door.remedies import PICTURE, PROMPT, draw, message, method, named
from tests.tiny import tiny_model, tiny_pipeline


def _classifier():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).eval()


class _Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = _classifier()

    def forward(self, x):
        return self.net(x).logits[:, 0]


def _network(read, **given):
    return Network("a net", "layer", 8, read, **given)


def _trained(rate):
    weight = nn.Parameter(torch.ones(2))
    player = Player(lambda draw: (weight**4).sum(), torch.optim.SGD([weight], lr=rate))
    trainer = Trainer(player)
    return [trainer.scalars(trainer.train_step()) for _ in range(6)]


def _outline():
    picture = torch.ones(3, 32, 32)
    picture[:, 8:24, 8] = picture[:, 8, 8:24] = -1
    picture[:, 8:24, 23] = picture[:, 23, 8:24] = -1
    return picture


def _layers(size, colours):
    layer = np.zeros((size, size, 4), np.uint8)
    layer[: size // 2] = (*colours[0], 255)
    layer[: size // 4] = (*colours[1], 255)
    return Image.fromarray(layer)


def _folder(path, prompts, pictures=2):
    path.mkdir(exist_ok=True)
    for i in range(pictures):
        PICTURE.save(path / f"{i}.png")
    (path / "p.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    return Folder(path, path / "p.jsonl")


#: advice -> the call that fails, and the one that follows what its message says; both get an empty folder
TABLE = {
    "call disable_gradient_checkpointing() first": (
        lambda at: _checkpointed(True), lambda said, at: _checkpointed(named(r"call (\w+)\(\)", said)),
    ),
    "give target as a function": (
        lambda at: lrp(_Scalar(), torch.randn(1, 3, 8, 8)),
        lambda said, at: lrp(_Scalar(), torch.randn(1, 3, 8, 8), target=lambda out: out),
    ),
    "targets for 2 samples; give one for all or one each": (
        lambda at: lrp(_classifier(), torch.randn(2, 3, 8, 8), target=[0, 1, 1]),
        lambda said, at: [lrp(_classifier(), torch.randn(2, 3, 8, 8), target=each) for each in (1, [0, 1])],
    ),
    "call eval()": (
        lambda at: _vectors(nn.Dropout(0.5)), lambda said, at: _vectors(nn.Dropout(0.5).eval()),
    ),
    "decodes no vectors; use an autoencoder (toy-ae)": (
        lambda at: _network(lambda x: (x.flatten(1), None)).pictures(torch.randn(2, 4)),
        lambda said, at: _autoencoder().pictures(torch.randn(2, 64)),
    ),
    "lower the learning rate (lr)": (lambda at: _trained(1e9), lambda said, at: _trained(1e-3)),
    "it must be a word, such as critic": (
        lambda at: _player("a b"), lambda said, at: _player(named(r"such as (\w+)", said)),
    ),
    "draw a closed dark outline on light paper": (
        lambda at: inside_of(torch.ones(3, 32, 32)), lambda said, at: inside_of(_outline()),
    ),
    "; resize it.": (
        lambda at: drawn_in(_outline(), torch.zeros(1, 3, 16, 16)),
        lambda said, at: drawn_in(_outline(), torch.zeros(1, 3, 32, 32)),
    ),
    "give a file that latent_geometry wrote": (
        lambda at: Directions.load(at / "none.safetensors"),
        lambda said, at: Directions.load(Directions(torch.eye(3), "mid", {}).save(at / "d.safetensors")),
    ),
    "give a list with --attributes": (
        lambda at: SadPad().find_attributes(["xyzzy"]),
        lambda said, at: [(at / "list.txt").write_text("red\nblue"), read_attributes(at / "list.txt")],
    ),
    "; name a new file": (
        lambda at: free(_touched(at / "x.safetensors")), lambda said, at: free(at / "new.safetensors"),
    ),
    "use a CLIP of pictures (toy-clip)": (
        lambda at: load_clip("toy-clip-noisy").features([PICTURE]),
        lambda said, at: load_clip(named(r"pictures \((\S+)\)", said)).features([PICTURE]),
    ),
    "use a noise-aware CLIP (toy-clip-noisy)": (
        lambda at: load_clip("toy-clip").latents(torch.randn(1, 4, 16, 16), 0.5, 0.5),
        lambda said, at: _reads_noise(named(r"CLIP \((\S+)\)", said)),
    ),
    "in a single colour on a transparent layer": (
        lambda at: masks.read_mask(_layers(32, [(255, 0, 0), (0, 255, 0)])),
        lambda said, at: [masks.read_mask(_layers(32, [(255, 0, 0)] * 2)),
                          masks.read_mask(_layers(32, [(255,) * 3] * 2).convert("RGB"))],
    ),
    "is too large for a recipe; give it as a file": (
        lambda at: masks.as_text(np.zeros((4100, 4100), np.uint8)), lambda said, at: masks.as_text(at / "mask.png"),
    ),
    'name each picture with "file_name", or give one line per picture in the order of the names': (
        lambda at: _folder(at / "f", ['{"prompt": "a"}']),
        lambda said, at: [_folder(at / "f", ['{"prompt": "a"}', '{"prompt": "b"}']),
                          _folder(at / "f", ['{"file_name": "1.png", "prompt": "a"}'])],
    ),
    "; name a folder of pictures": (
        lambda at: Folder(at / "none"), lambda said, at: _folder(at / "f", ['{"prompt": "a"}'] * 2),
    ),
    "use a flow's path": (
        lambda at: Noise(tiny_pipeline("sd3").scheduler), lambda said, at: Noise(tiny_pipeline("sd").scheduler),
    ),
    "write class=share, such as cone=0.5": (
        lambda at: scorer_of("toy-vit", "cone", ["cone"], []),
        lambda said, at: scorer_of("toy-vit", "cone", [named(r"such as (\S+?)\.$", said)], []),
    ),
    "take one that is none, such as <": (
        lambda at: refuse_word(text_towers(tiny_model("sd")), "cube"),
        lambda said, at: refuse_word(text_towers(tiny_model("sd")), named(r"such as (\S+?)\.$", said)),
    ),
    "is a flow model: leave it 0": (
        lambda at: Denoising(tiny_model("sd3"), 1, 0, snr_gamma=5.0),
        lambda said, at: Denoising(tiny_model("sd3"), 1, 0, snr_gamma=0),
    ),
    "teach the checkpoint for whole pictures that it is of": (
        lambda at: Denoising(tiny_model("inpaint"), 1, 0), lambda said, at: Denoising(tiny_model("sd"), 1, 0),
    ),
    "ask one system for its own, as run['daam'].maps": (
        lambda at: _guest(DAAM(), DAAM(words=["cube"])).maps,
        lambda said, at: eval(named(r"as (run\[.*\]\.maps)", said), {"run": _guest(DAAM(), DAAM(words=["cube"]))}),
    ),
    "that is known, leave it out": (
        lambda at: _guest(DAAM(), text="first 77"), lambda said, at: _guest(DAAM()),
    ),
    "say what it says: attached(..., prompt='...')": (
        lambda at: _guest(DAAM(), embeds=True), lambda said, at: _guest(DAAM(), embeds=True, prompt=PROMPT),
    ),
    "give all of them to one attached(...)": (
        lambda at: _nested(), lambda said, at: _guest(DAAM(), DAAM(words=["cube"])),
    ),
    "give them to this run as interventions, or call the pipeline": (
        lambda at: _own_run(), lambda said, at: [draw(tiny_model("sd"), by=DAAM()), _guest(DAAM())],
    ),
    "give timesteps=[first|last] for each model": (
        lambda at: _expert(at), lambda said, at: _expert(at, timesteps=[[0, 500]]),
    ),
    "give a translator": (
        lambda at: _explorer().samples(torch.zeros(1, 3, 8, 8)),
        lambda said, at: _explorer(named(r"call (\w+)\(", said)).samples(torch.randn(1, 3, 8, 8), n=1),
    ),
    "give an autoencoder of vectors (toy-ae)": (
        lambda at: InvarianceExplorer(nn.Flatten(), "0", _network(lambda x: (x, None))),
        lambda said, at: InvarianceExplorer(nn.Flatten(), "0", _autoencoder()),
    ),
    "or give any_base=true to try it with this one": (
        lambda at: draw(tiny_model("sd"), by=_taught(at)),
        lambda said, at: draw(tiny_model("sd"), by=_taught(at, **{named(r"give (\w+)=true", said): True})),
    ),
}  # fmt: skip


def _checkpointed(way_back):
    model = tiny_model("sd", fresh=True)
    model.denoiser.enable_gradient_checkpointing()
    if isinstance(way_back, str):
        getattr(model.denoiser, way_back)()
    with torch.enable_grad():
        return draw(model, by=method("attend_excite", words=["cube"], thresholds=[]))


def _vectors(net):
    return _network(lambda x: (net(x).flatten(1), None)).vectors(torch.randn(4, 3, 8, 8))


def _autoencoder():
    return network_of(load_autoencoder("toy-ae"))


def _player(name):
    weight = nn.Parameter(torch.ones(2))
    return Player(lambda draw: weight.sum(), torch.optim.SGD([weight], lr=0.1), name=name)


def _reads_noise(name):
    clip = load_clip(name)
    channels = clip.model.config.vision_config.num_channels - PLANES
    return clip.latents(torch.randn(1, channels, 16, 16), 0.5, 0.5)


def _touched(path):
    path.touch()
    return path


def _guest(*systems, embeds=False, **given):
    pipe = tiny_pipeline("sd", fresh=True)
    asked = {"prompt": PROMPT}
    if embeds:
        rows = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        asked = {"prompt_embeds": rows[0], "negative_prompt_embeds": rows[1]}
    with sfumato.attached(pipe, *systems, **given) as run:
        pipe(**asked, num_inference_steps=1, height=32, width=32, output_type="latent")
    return run


def _nested():
    pipe = tiny_pipeline("sd", fresh=True)
    with sfumato.attached(pipe, DAAM()), sfumato.attached(pipe, DAAM()):
        pass


def _own_run():
    model = tiny_model("sd", fresh=True)
    with sfumato.attached(model.pipe, DAAM()):
        draw(model)


def _expert(at, **given):
    folder = at / "expert"
    if not folder.exists():
        with quiet():
            tiny_pipeline("sd").save_pretrained(folder)
    return draw(tiny_model("sd"), by=method("experts", models=[str(folder)], **given))


def _explorer(then=""):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    found = InvarianceExplorer(net, "1", _network(lambda x: (x.flatten(1)[:, :4], None), decode=lambda z: z))
    if then:
        getattr(found, then)(torch.randn(64, 3, 8, 8), params=FlowParams(steps=2, blocks=1))
    return found


def _taught(at, **given):
    place = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{place}.lora_A.weight": torch.ones(2, 32), f"{place}.lora_B.weight": torch.ones(32, 2)}
    save_file(state, at / "taught.safetensors", {BASE: "0" * 64, "sfumato.base": "another"})
    return method("lora", file=str(at / "taught.safetensors"), **given)


@pytest.mark.parametrize("fragment", TABLE)
def test_library(fragment, tmp_path):
    fails, helps = TABLE[fragment]
    said = message(lambda: fails(tmp_path))
    assert fragment in said
    helps(said, tmp_path)
