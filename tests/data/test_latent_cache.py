"""Latents are encoded once for what they depend on, anew when any of it changes, and a broken entry harms nobody."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from alignkit.data import latent_cache
from alignkit.data.latent_cache import LatentCache, content_hash, default_cache, encoder_hash, latent_key
from alignkit.data.stored import PIECE
from alignkit.data.video import write_mp4
from alignkit.errors import DataError
from alignkit.policy import Conditioning, Policy
from alignkit.training.offline import OfflineData
from tests.policy.zoo import ZOO

KEY, OTHER = "ab" + "0" * 62, "cd" + "1" * 62


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))


def vae(**changes: object) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(block_out_channels=(32,), norm_num_groups=32, latent_channels=4, **changes)


# the folder


def test_what_was_written_is_read_again_and_nothing_else_is(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path / "new")
    assert cache.read(KEY) is None and not cache.folder.exists()
    cache.write(KEY, latents())
    torch.testing.assert_close(LatentCache(tmp_path / "new").read(KEY), latents(), rtol=0, atol=0)
    assert cache.read(OTHER) is None


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text"])
def test_a_damaged_entry_is_said_and_written_anew(how: str, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path)
    cache.write(KEY, latents())
    file = cache.file(KEY)
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.write_bytes({"cut": content[:-9], "flipped": content, "empty": b"", "text": b"no latents"}[how])
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged .*; its latents are encoded again"):
        assert cache.read(KEY) is None
    cache.write(KEY, latents())
    torch.testing.assert_close(cache.read(KEY), latents(), rtol=0, atol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_a_process_that_dies_while_it_writes_leaves_no_entry_and_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"as far as it came")
        os._exit(9)  # as a kill does: nothing is tidied up

    cache = LatentCache(tmp_path)
    cache.write(KEY, latents())
    for key in (KEY, OTHER):
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(latent_cache, "save_file", dying)
            cache.write(key, latents(2))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    torch.testing.assert_close(cache.read(KEY), latents(), rtol=0, atol=0)
    assert cache.read(OTHER) is None
    cache.write(OTHER, latents(1))
    torch.testing.assert_close(cache.read(OTHER), latents(1), rtol=0, atol=0)


def test_entries_that_were_not_read_for_longest_make_room(tmp_path: Path) -> None:
    size = latents().nbytes + 400
    keys = [f"{i:02d}" + "a" * 62 for i in range(6)]
    for i, key in enumerate(keys[:5]):
        LatentCache(tmp_path).write(key, latents(i))
        os.utime(LatentCache(tmp_path).file(key), (1000 + i, 1000 + i))
    cache = LatentCache(tmp_path, limit=4 * size)
    assert cache.read(keys[0]) is not None  # now it is the newest
    cache.write(keys[5], latents(5))
    assert [key for key in keys if cache.read(key) is not None] == [keys[0], keys[3], keys[4], keys[5]]


def test_a_folder_that_cannot_be_written_is_said_once_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = LatentCache(tmp_path / "file" / "latents")
    with pytest.warns(UserWarning, match="cannot be written .* name another folder with ALIGNKIT_CACHE") as said:
        cache.write(KEY, latents())
        cache.write(OTHER, latents())
    assert len(said) == 1 and cache.read(KEY) is None


def test_the_place_is_the_users_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path))
    found = default_cache()
    assert found is not None and found.folder == tmp_path / "latents"
    monkeypatch.setenv("ALIGNKIT_CACHE", "off")
    assert default_cache() is None


# keys


def test_a_file_is_known_by_its_content_and_by_nothing_else(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("a", "b", "c"))
    one.write_bytes(b"x" * (PIECE + 5))
    same.write_bytes(b"x" * (PIECE + 5))
    other.write_bytes(b"x" * (PIECE + 4) + b"y")
    assert content_hash(one) == content_hash(same) != content_hash(other)
    with pytest.raises(DataError, match="gone cannot be read"):
        content_hash(tmp_path / "gone")


def test_frames_of_a_folder_do_not_run_into_each_other(tmp_path: Path) -> None:
    for name, frames in (("a", (b"12", b"3")), ("b", (b"1", b"23"))):
        (tmp_path / name).mkdir()
        for i, content in enumerate(frames):
            (tmp_path / name / f"{i:03d}.png").write_bytes(content)
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_every_part_of_a_key_counts() -> None:
    parts = ("content", "spread evenly", (9, 3, 32, 32), (16, 5, 4, 4), "encoder", {"vae.use_tiling": False})
    changed = ("other", "the first", (9, 3, 64, 32), (4, 5, 4, 4), "other", {"vae.use_tiling": True})
    keys = {latent_key(*parts)}
    for i in range(len(parts)):
        keys.add(latent_key(*parts[:i], changed[i], *parts[i + 1 :]))  # type: ignore[arg-type]
    assert len(keys) == 1 + len(parts) and all(len(key) == 64 for key in keys)


def test_an_encoder_is_known_by_class_configuration_and_every_weight() -> None:
    own = vae()
    first = encoder_hash("SomePipeline", {"vae": own})
    assert encoder_hash("SomePipeline", {"vae": copy.deepcopy(own)}) == first
    moved = copy.deepcopy(own)
    with torch.no_grad():
        next(iter(moved.encoder.parameters())).view(-1)[0] += 1e-3
    others = [
        encoder_hash("OtherPipeline", {"vae": own}),
        encoder_hash("SomePipeline", {"vae": moved}),
        encoder_hash("SomePipeline", {"vae": vae(scaling_factor=0.5)}),
        encoder_hash("SomePipeline", {"vae": copy.deepcopy(own).half()}),
    ]
    assert len({first, *others}) == 5
    assert encoder_hash("SomePipeline", {"vae": copy.deepcopy(own).to("meta")}) is None


# what is learnt from


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    with Policy(ZOO["sd3"].build()) as made:
        yield made


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of the encoder."""
    calls: list[int] = []
    own = Policy.encode

    def counted(self: Policy, media: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        calls.append(len(media))
        return own(self, media, cond)

    monkeypatch.setattr(Policy, "encode", counted)
    return calls


def first_latents(policy: Policy, table: Path, cache: LatentCache) -> torch.Tensor:
    """Latents of the chosen side, as a new run learns from them."""
    data, entry = OfflineData(table, "pairs", cache), ZOO["sd3"]
    cond = policy.condition(data.prompts, num_steps=2, **{**entry.call, **entry.variants["unguided"]})
    return data.experience(policy, cond, 1, torch.Generator().manual_seed(0)).rollouts.x0


def pair(folder: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / name)
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "a.png", "rejected": "b.png"}))
    return folder / "pairs.jsonl"


def test_a_second_run_encodes_nothing_and_learns_from_the_same(
    policy: Policy, encodings: list[int], tmp_path: Path
) -> None:
    table = pair(tmp_path)
    first = first_latents(policy, table, LatentCache(tmp_path / "kept"))
    assert encodings == [1, 1]
    again = first_latents(policy, table, LatentCache(tmp_path / "kept"))
    assert encodings == [1, 1]
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    os.rename(tmp_path / "a.png", tmp_path / "c.png")
    table.write_text(table.read_text().replace("a.png", "c.png"))
    first_latents(policy, table, LatentCache(tmp_path / "kept"))
    assert encodings == [1, 1]


def test_a_second_epoch_encodes_nothing_where_memory_is_short(
    policy: Policy, encodings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.training.offline.KEPT", 0)
    entry, data = ZOO["sd3"], OfflineData(pair(tmp_path), "pairs", LatentCache(tmp_path / "kept"))
    cond = policy.condition(data.prompts, num_steps=2, **{**entry.call, **entry.variants["unguided"]})
    for seed in range(3):
        data.experience(policy, cond, 1, torch.Generator().manual_seed(seed))
    assert encodings == [1, 1]


def test_a_changed_picture_and_a_changed_vae_are_encoded_again(
    policy: Policy, encodings: list[int], tmp_path: Path
) -> None:
    table, cache = pair(tmp_path), LatentCache(tmp_path / "kept")
    first = first_latents(policy, table, cache)
    Image.new("RGB", (32, 32), "green").save(tmp_path / "a.png")
    assert (first_latents(policy, table, cache) - first).abs().max() > 1e-3
    assert len(encodings) == 3
    pipe = ZOO["sd3"].build()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1.5)
    with Policy(pipe) as other:
        first_latents(other, table, cache)
    assert len(encodings) == 5


def test_other_tiles_another_range_and_another_precision_are_encoded_again(
    policy: Policy, encodings: list[int], tmp_path: Path
) -> None:
    table, cache = pair(tmp_path), LatentCache(tmp_path / "kept")
    first = first_latents(policy, table, cache)
    pipe = ZOO["sd3"].build()
    with Policy(pipe) as other:
        pipe.vae.enable_tiling()
        first_latents(other, table, cache)
        assert len(encodings) == 4
        pipe.vae.disable_tiling()
        pipe.image_processor.register_to_config(do_normalize=False)
        assert (first_latents(other, table, cache) - first).abs().max() > 1e-3
        assert len(encodings) == 6
        pipe.image_processor.register_to_config(do_normalize=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first_latents(other, table, cache)
        assert len(encodings) == 8
        first_latents(other, table, cache)
        assert len(encodings) == 8


def test_a_damaged_entry_is_encoded_again(policy: Policy, encodings: list[int], tmp_path: Path) -> None:
    table, cache = pair(tmp_path), LatentCache(tmp_path / "kept")
    first = first_latents(policy, table, cache)
    for file in cache.folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="is damaged"):
        again = first_latents(policy, table, cache)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert len(encodings) == 4


def test_clips_of_a_video_pipeline_are_encoded_once_for_each_number_of_frames(
    encodings: list[int], tmp_path: Path
) -> None:
    for name, value in (("a.mp4", 0.2), ("b.mp4", 0.8)):
        write_mp4(tmp_path / name, torch.full((12, 3, 48, 40), value), fps=8)
    table, cache = tmp_path / "pairs.jsonl", LatentCache(tmp_path / "kept")
    table.write_text(json.dumps({"prompt": "a", "chosen": "a.mp4", "rejected": "b.mp4"}))
    entry = ZOO["wan_t2v"]
    with Policy(entry.build()) as policy:
        for frames, encoded in ((5, 2), (9, 4), (5, 4)):
            data = OfflineData(table, "pairs", cache)
            call = {**entry.call, **entry.variants["unguided"], "num_frames": frames}
            cond = policy.condition(data.prompts, num_steps=2, **call)
            experience = data.experience(policy, cond, 1, torch.Generator().manual_seed(0))
            assert experience.rollouts.x0.shape[-3] == (frames - 1) // 4 + 1
            assert len(encodings) == encoded
