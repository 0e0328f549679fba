"""Folders, shards and clips as training data, against pictures that are known."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.clips import save_clip
from sfumato.errors import BadInput
from sfumato.toybox import ToyboxDataset
from sfumato.toybox.dataset import export_imagefolder
from sfumato.training import Draw
from sfumato.training.samples import FilePart, draw_batch, open_samples


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """(width, height) of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def as_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255 * 2 - 1


def test_the_toyboxs_own_imagefolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    folder = export_imagefolder(tmp_path / "toys", n=3, size=32, style="full")
    data, source = open_samples(folder, (32, 32)), ToyboxDataset("train", 3, 32)
    assert len(data) == 3
    for i in range(3):
        one = data.sample(i)
        assert one.caption == source.caption(i).text and one.facts["file_name"] in one.name
        assert torch.equal(((one.pixels + 1) * 127.5).round().byte().permute(1, 2, 0), torch.tensor(source.images[i]))
        assert torch.equal(one.mask, torch.from_numpy(source.masks[i] >= 0).float())


def test_tables_name_pictures_masks_and_pairs(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        picture(seed).save(tmp_path / f"{name}.png")
    grey = np.zeros((16, 24), np.uint8)
    grey[4:8] = 100
    Image.fromarray(grey).save(tmp_path / "m.png")
    rows = [
        {"file_name": "a.png", "caption": "an a", "mask": "m.png", "target": "b.png", "label": "x"},
        {"file_name": "c.png", "text": "", "mask": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    first, second = (open_samples(tmp_path, (24, 16)).sample(i) for i in range(2))
    assert first.caption == "an a" and first.facts["label"] == "x" and second.caption == ""
    assert torch.equal(first.pixels, as_pixels(picture(0))) and torch.equal(first.target, as_pixels(picture(1)))
    assert first.mask.unique().tolist() == [0, 1] and first.mask[4:8].min() == 1
    assert second.mask is None and second.target is None
    soft = open_samples(tmp_path, (24, 16), soft_masks=True).sample(0).mask
    assert soft.max() == pytest.approx(100 / 255)
    (tmp_path / "metadata.jsonl").unlink()
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["file_name", "text"])
        table.writeheader()
        table.writerow({"file_name": "b.png", "text": "a b, with a comma"})
    only = open_samples(tmp_path, (24, 16))
    assert len(only) == 1 and only.sample(0).caption == "a b, with a comma"


def test_pictures_with_texts_beside_them_and_every_kind_of_picture(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    turned = picture(0, (16, 24)).rotate(90, expand=True)  # lies on its side; EXIF 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a[1].png", exif=exif)
    (tmp_path / "a[1].txt").write_text(" upright \n", encoding="utf-8")
    Image.new("L", (24, 16), 128).save(tmp_path / "deep" / "b.jpg")
    Image.new("RGBA", (24, 16), (255, 0, 0, 0)).save(tmp_path / "c.webp")
    Image.fromarray(np.full((16, 24), 255, np.uint8)).save(tmp_path / "c.mask.png")
    data = open_samples(tmp_path, (16, 24))
    names = [Path(data.sample(i).name).name for i in range(len(data))]
    assert names == ["a[1].png", "c.webp", "b.jpg"]
    first, white, grey = (data.sample(i) for i in range(3))
    assert first.caption == "upright" and torch.equal(first.pixels, as_pixels(picture(0, (16, 24))))
    assert white.pixels.min() == 1 and white.mask.min() == 1 and first.mask is None
    assert float(grey.pixels.mean()) == pytest.approx(128 / 127.5 - 1, abs=0.02)


def test_sizes_are_covered_and_cut_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide[..., 0]).save(tmp_path / "a.mask.png")
    one = open_samples(tmp_path, (16, 16)).sample(0)
    assert one.pixels.min() == 1 and one.mask.min() == 1


def test_batches_are_pure_functions_of_their_draw(tmp_path: Path) -> None:
    for i in range(5):
        picture(i).save(tmp_path / f"{i}.png")
        picture(i).convert("L").save(tmp_path / f"{i}.mask.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    data = open_samples(tmp_path, (24, 16), soft_masks=True)
    one, again = (draw_batch(data, Draw(3, 2), 4, flip=True) for _ in range(2))
    assert torch.equal(one.pixels, again.pixels) and one.pixels.shape == (4, 3, 16, 24)
    assert one.masks.shape == (4, 1, 16, 24) and one.targets is None
    rows = Draw(3, 2).indices(5, 4).tolist()
    assert one.captions == [f"number {i}" for i in rows]
    for i, pixels, mask in zip(rows, one.pixels, one.masks, strict=True):
        alone = data.sample(i)
        mirrored = not torch.equal(pixels, alone.pixels)
        assert torch.equal(pixels.flip(-1) if mirrored else pixels, alone.pixels)
        assert torch.equal(mask[0].flip(-1) if mirrored else mask[0], alone.mask)
    later = [draw_batch(data, Draw(0, step), 5, flip=True) for step in range(8)]
    pairs = [(p, int(c[7:])) for each in later for p, c in zip(each.pixels, each.captions, strict=True)]
    assert 8 < sum(not torch.equal(pixels, data.sample(i).pixels) for pixels, i in pairs) < 32
    shares = [draw_batch(data, Draw(3, 2, rank, 2), 4).names for rank in range(2)]
    assert sorted(sum(shares, [])) == sorted(one.names)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_shards(folder: Path) -> str:
    for shard in range(2):
        with tarfile.open(folder / f"data-{shard:03}.tar", "w") as tar:
            for i in range(3):
                key = f"part/{shard}{i}"
                add(tar, f"{key}.png", png(picture(10 * shard + i)))
                if i:
                    add(tar, f"{key}.txt", f"picture {shard} {i}\n".encode())
                add(tar, f"{key}.json", json.dumps({"caption": "from json", "n": i}).encode())
                add(tar, f"{key}.mask.png", png(Image.new("L", (24, 16), 255 * (i == 1))))
            add(tar, "readme.md", b"no sample")
    return str(folder / "data-{000..001}.tar")


def test_many_pictures_are_listed_once_and_read_when_they_are_drawn(tmp_path: Path, monkeypatch) -> None:
    """What is held of a picture is its place: neither memory nor looks into folders grow as its content would."""
    scans, reads, peaks = [], [], {}
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda *at: (scans.append(at), scan(*at))[1])
    picture_of = FilePart.picture
    monkeypatch.setattr(FilePart, "picture", lambda self: (reads.append(self.name), picture_of(self))[1])
    content = png(picture(0))
    for n in (20, 120):
        folder, shard = tmp_path / f"{n}", tmp_path / f"{n}.tar"
        folder.mkdir()
        with tarfile.open(shard, "w") as tar:
            for i in range(n):
                (folder / f"{i}.png").write_bytes(content)
                (folder / f"{i}.mask.png").write_bytes(content)
                add(tar, f"{i}.png", content)
        for where in (folder, shard):
            scans.clear()
            tracemalloc.start()
            data = open_samples(where, (24, 16))
            peaks[n, where.suffix] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert len(data) == n and len(scans) <= 4 and not reads, (where, len(scans))
            draw_batch(data, Draw(0, 0), 2)
            assert len(reads) == (4 if where == folder else 2), where  # with their masks
            reads.clear()
    for suffix in ("", ".tar"):
        assert (peaks[120, suffix] - peaks[20, suffix]) / 100 < 4096, peaks


def test_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    named = write_shards(tmp_path)
    for where in (named, tmp_path):
        data = open_samples(where, (24, 16))
        assert len(data) == 6
        for row in range(6):
            shard, i = divmod(row, 3)
            one = data.sample(row)
            assert torch.equal(one.pixels, as_pixels(picture(10 * shard + i)))
            assert one.caption == (f"picture {shard} {i}" if i else "from json") and one.facts["n"] == i
            assert float(one.mask.mean()) == (i == 1)
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar"}  # nothing was unpacked


def test_clips_from_files_folders_and_shards(tmp_path: Path) -> None:
    frames = np.stack([np.full((16, 24, 3), 20 * i, np.uint8) for i in range(9)])
    videos = tmp_path / "videos"
    (videos / "frames").mkdir(parents=True)
    for i, frame in enumerate(frames):  # frame10 comes after frame9
        Image.fromarray(frame).save(videos / "frames" / f"frame{i + 2}.png")
    (videos / "frames.txt").write_text("numbered")
    save_clip(videos / "a.gif", frames, {})
    (videos / "a.txt").write_text("a gif")
    save_clip(videos / "b.mp4", frames, {})
    data = open_samples(videos, (24, 16), frames=4, stride=2)
    assert [Path(data.sample(i).name).name for i in range(3)] == ["a.gif", "b.mp4", "frames"]
    wanted = torch.tensor([0, 40, 80, 120]) / 127.5 - 1
    for i, (caption, tolerance) in enumerate([("a gif", 1e-6), ("", 0.03), ("numbered", 1e-6)]):
        one = data.sample(i)
        assert one.caption == caption and one.pixels.shape == (3, 4, 16, 24)
        torch.testing.assert_close(one.pixels.mean((0, 2, 3)), wanted, atol=tolerance, rtol=0)
    starts = {float(data.sample(0, torch.Generator().manual_seed(seed)).pixels[0, 0, 0, 0]) for seed in range(20)}
    assert len(starts) == 3  # of nine frames seven are spanned
    with pytest.raises(BadInput, match=r"a\.gif has 9 frames; 8 of stride 2"):
        open_samples(videos, (24, 16), frames=8, stride=2).sample(0)
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        add(tar, "x.mp4", (videos / "b.mp4").read_bytes())
        add(tar, "y.mp4", b"no video")
    shard = open_samples(tmp_path / "clips.tar", (24, 16), frames=9)
    assert torch.equal(shard.sample(0).pixels[:, ::2][:, :4], data.sample(1).pixels)
    with pytest.raises(BadInput, match=r"clips\.tar/y\.mp4 cannot be read"):
        shard.sample(1)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere is no folder"):
        open_samples(tmp_path / "nowhere", (8, 8))
    with pytest.raises(BadInput, match="holds no picture"):
        open_samples(tmp_path, (8, 8))
    (tmp_path / "a.png").write_bytes(png(picture(0))[:-40])
    with pytest.raises(BadInput, match=r"a\.png cannot be read as a picture"):
        open_samples(tmp_path, (8, 8)).sample(0)
    table = tmp_path / "metadata.jsonl"
    for text, message in (
        ('{"file_name": "a.png"}\n{"file_name": "z.png"}', "line 2 of .* names z.png, which is not there"),
        ('{"text": "a"}', "line 1 of .* has no file_name"),
        ("[]", "line 1 of .* is no row"),
        ("{", "line 1 of .* is not JSON"),
    ):
        table.write_text(text)
        with pytest.raises(BadInput, match=message) as caught:
            open_samples(tmp_path, (8, 8))
        assert "\n" not in str(caught.value)
    broken = tmp_path / "shards"
    broken.mkdir()
    (broken / "0.tar").write_bytes(b"x" * 600)
    with pytest.raises(BadInput, match=r"0\.tar cannot be read as a tar"):
        open_samples(broken, (8, 8))
    with tarfile.open(broken / "0.tar", "w") as tar:
        add(tar, "k.png", b"no picture")
    with pytest.raises(BadInput, match=r"0\.tar/k\.png cannot be read as a picture"):
        open_samples(broken, (8, 8)).sample(0)
    with pytest.raises(BadInput, match="frames and stride"):
        open_samples(broken, (8, 8), frames=0)
