"""How modules are spelt in files: diffusers' dotted paths, kohya's names with underscores, names of the original code.

The other direction of :mod:`sfumato.adapters.naming`. Which word of an underscored name belongs to which part of a path
follows from the names that diffusers and transformers use (:data:`COMPOUND`); where a model's index is at hand, it is
looked up instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sfumato.adapters.naming import DENOISER, Place, published
from sfumato.errors import NotSupported

__all__ = ["dotted", "original_names", "published_path", "underscored", "unet_shapes"]

#: parts of paths that have an underscore of their own
COMPOUND = tuple(
    """down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks joint_blocks motion_modules
    to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj q_proj k_proj v_proj out_proj proj_in proj_out
    proj_mlp time_emb_proj conv_in conv_out conv_shortcut time_embedding add_embedding linear_1 linear_2 cond_proj
    time_text_embed timestep_embedder text_embedder guidance_embedder context_embedder x_embedder pos_embed norm_out
    norm1_context norm2_context ff_context adaln_single caption_projection text_model self_attn text_projection
    wi_0 wi_1""".split()
)


def dotted(name: str) -> str:
    """The path of a module whose name has ``_`` for ``.``: ``down_blocks_0_..._to_k`` is ``down_blocks.0...to_k``."""
    known, out, rest = sorted(COMPOUND, key=len, reverse=True), [], name
    while rest:
        part = next((each for each in known if rest == each or rest.startswith(f"{each}_")), rest.partition("_")[0])
        out.append(part)
        rest = rest[len(part) + 1 :]
    return ".".join(out)


def unet_shapes(paths: Iterable[str], layers: int = 2) -> dict[str, tuple[int, ...]]:
    """A U-Net's index as far as names need it, from some of its paths: two layers a block, as all published ones, or
    as many as are said."""
    standing = [f"down_blocks.0.resnets.{i}.conv1" for i in range(layers)]
    return dict.fromkeys([*standing, *paths], (0, 0))


def original_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, Place]]:
    """Path of each module -> its name in the code that the model was first published with, and the rows it has there
    (of all, where none are said)."""
    out = {}
    for name, several in published(shapes):
        for path, rows in several:
            if path in shapes:
                out[path] = (name, Place(DENOISER, path, rows))
    return out


def underscored(component: str, path: str, several_texts: bool, t5: bool) -> str:
    """kohya's name of a module of a component, its prefix included."""
    if not component.startswith("text_encoder"):
        return f"lora_unet_{path.replace('.', '_')}"
    number = {"text_encoder": "1", "text_encoder_2": "2", "text_encoder_3": "3"}.get(component)
    if number is None:
        raise NotSupported(f"kohya's files have no name for {component}.")
    if t5:
        return f"lora_te3_{path.replace('.', '_')}"
    plain = path.removeprefix("text_model.").replace(".", "_")
    return f"lora_te{number if several_texts else ''}_text_model_{plain}"


def published_path(component: str, path: str) -> str:
    """A path as files have it: transformers 5 has no ``text_model`` in some CLIPs, which every file still has."""
    return f"text_model.{path}" if component.startswith("text_encoder") and path.startswith("encoder.layers.") else path
