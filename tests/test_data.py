"""Sample images, and folders of pictures."""

import pickle
import sys

import numpy as np
import pytest
import torch
from golden import load_case
from hypothesis import settings
from pictures import save
from PIL import Image

from visionhybrid.data import samples
from visionhybrid.data.gallery import Folder
from visionhybrid.data.scan import find_pictures, match_pairs, read_list

CASE = load_case("hat_degrade_ops_64x80")
quick = settings(max_examples=40, deadline=None)

# ---- sample images --------------------------------------------------------------------------------------------------


def test_digits_split():
    (train, train_labels), (held_out, held_out_labels) = samples.digits("train"), samples.digits("val")
    assert train.shape == (1442, 1, 8, 8)
    assert held_out.shape == (355, 1, 8, 8)
    assert train.dtype == torch.float32
    assert (train.min(), train.max()) == (0, 1)
    # Every class is split alike, and together they are the whole set, once.
    share = held_out_labels.bincount() / (train_labels.bincount() + held_out_labels.bincount())
    assert share.shape == (10,)
    assert share.min() > 0.19
    assert share.max() <= 0.2
    from sklearn.datasets import load_digits

    everything = torch.from_numpy(load_digits().data).float() / 16
    both = torch.cat([train, held_out]).flatten(1)
    assert sorted(both.tolist()) == sorted(everything.tolist())


def test_photographs():
    train, held_out = samples.photographs("train"), samples.photographs("val")
    assert [p.name for p in held_out] == ["coffee", "rocket", "camera", "china"]
    assert len(train) == 18
    assert not {p.name for p in train} & {p.name for p in held_out}
    assert sum(p.pixels[0].numel() for p in train + held_out) == 7394225
    assert all(p.pixels.dtype == torch.uint8 and p.credit and p.license for p in train + held_out)
    assert {len(p.pixels) for p in train} == {1, 3}
    assert {len(p.pixels) for p in samples.photographs("val", channels=3)} == {3}
    grey = samples.photographs("val", channels=1)[0].pixels
    want = np.array(Image.fromarray(held_out[0].pixels.permute(1, 2, 0).numpy()).convert("L"))
    assert (grey[0].int() - torch.from_numpy(want).int()).abs().max() <= 1


@pytest.mark.parametrize(("call", "module"), [(samples.digits, "sklearn"), (samples.photographs, "skimage")])
def test_missing_packages_name_the_extra(call, module, monkeypatch):
    samples._pixels.cache_clear()
    for name in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "visionhybrid\[samples\]"') as caught:
        call()
    assert "\n" not in str(caught.value)
    samples._pixels.cache_clear()


def test_unknown_split_lists_the_splits():
    for call in (samples.digits, samples.photographs):
        with pytest.raises(ValueError, match="no split 'test'; have train, val"):
            call("test")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_find_pictures(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/.hidden.png", ".cache/d.png", "notes.txt"):
        save(tmp_path / "e.png", 4, 4)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert find_pictures(tmp_path) == ["a/c.JPG", "b.png", "e.png"]


def test_nothing_to_find_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no pictures in this folder"):
        find_pictures(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_pictures(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("0801.png", "0801.png"),
        ("0801.png", "0801x4.png"),
        ("a/baby.png", "a/baby_x4.jpg"),
        ("img_001_SRF_4_HR.png", "img_001_SRF_4_LR.png"),
        ("Canon_001_HR.png", "Canon_001_LR4.png"),
        ("with.dots.png", "with.dotsx4.png"),
    ],
)
def test_partners(high, low):
    assert match_pairs([high], ["other.png", low, "0801x2.png"], 4) == [(high, low)]


def test_exact_names_win_and_missing_or_double_partners_are_errors():
    assert match_pairs(["a.png"], ["ax4.png", "a.png"], 4) == [("a.png", "a.png")]
    with pytest.raises(
        ValueError, match=r"1 of 2 pictures have no .* first b\.png \(tried b, bx2, b_x2, b-x2\)"
    ):
        match_pairs(["a.png", "b.png"], ["a.png", "bx4.png"], 2)
    with pytest.raises(ValueError, match=r"more than one .* partner: a\.jpg, a\.png"):
        match_pairs(["a.png"], ["a.jpg", "a.png"], 2)


def test_meta_info_lists(tmp_path):
    listed = tmp_path / "meta.txt"
    listed.write_text("a b.png (480,480,3)\n\nsub/c.png (12,13,1) 1\nd(1).png\n")
    assert read_list(listed) == ["a b.png", "sub/c.png", "d(1).png"]
    save(tmp_path / "a b.png", 4, 4)
    with pytest.raises(ValueError, match=r"2 of 3 pictures of .* are not there, first sub/c\.png"):
        Folder(tmp_path, names=listed)
    listed.write_text("a b.png (480,480,3)\n")
    save(tmp_path / "other.png", 4, 4)
    assert Folder(tmp_path, names=listed).files == ["a b.png"]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_channels(tmp_path, mode):
    save(tmp_path / "x.png", 9, 7, mode=mode)
    colour, grey = Folder(tmp_path).picture(0), Folder(tmp_path, channels=1).picture(0)
    assert (colour.shape, grey.shape) == ((3, 9, 7), (1, 9, 7))
    assert colour.dtype == grey.dtype == torch.uint8
    if mode in ("L", "LA"):
        assert torch.equal(colour, grey.expand(3, -1, -1))


def test_sixteen_bits_stay_fine(tmp_path):
    levels = np.arange(0, 65536, 512, dtype=np.uint16).reshape(8, 16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    x = Folder(tmp_path, channels=1).picture(0)
    assert x.dtype == torch.float32
    assert len(x.unique()) == 128


def test_cache_keeps_what_fits(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", 10, 10, seed=i)
    folder = Folder(tmp_path, cache=2 * 300)
    pictures = [folder.picture(i) for i in range(3)]
    assert [folder.picture(i) is pictures[i] for i in range(3)] == [True, True, False]
    assert torch.equal(folder.picture(2), pictures[2])
    # A loading process starts empty, with all of the room.
    copy = pickle.loads(pickle.dumps(folder))
    assert copy.picture(2) is copy.picture(2)
