"""What is opened: containers, prefixes, broken and hostile files, folders."""

import argparse
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toy import Toy, authors, randomised, same

import visionhybrid
from visionhybrid.models import registry

pytestmark = pytest.mark.usefixtures("toy_system")


# ---- containers


def wrong(toy):
    return {name: value + 1 if value.is_floating_point() else value for name, value in authors(toy).items()}


CONTAINERS = {
    "raw": lambda right, wrong: right,
    "params_ema": lambda right, wrong: {"params": wrong, "params_ema": right},
    "params-ema": lambda right, wrong: {"params": wrong, "params-ema": right},
    "params": lambda right, wrong: {"params": right, "iter": 7},
    "state_dict_ema": lambda right, wrong: {"state_dict": wrong, "state_dict_ema": right, "epoch": 3},
    "model_ema": lambda right, wrong: {"model": wrong, "model_ema": right},
    "state_dict": lambda right, wrong: {"state_dict": right, "meta": {"CLASSES": ["a"]}},
    "model_state_dict": lambda right, wrong: {"model_state_dict": right},
    "model": lambda right, wrong: {"model": right, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "net": lambda right, wrong: {"net": right},
    "model.state_dict": lambda right, wrong: {"model": {"state_dict": right}},
    "anything": lambda right, wrong: {"anything": right, "step": torch.tensor(3)},
    "outer.params_ema": lambda right, wrong: {"outer": {"params_ema": right, "params": wrong}},
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("suffix", ["pth", "old.pt", "memory"])
def test_containers(name, suffix, toy, tmp_path):
    content = CONTAINERS[name](authors(toy), wrong(toy))
    source = tmp_path / f"weights.{suffix}"
    if suffix == "memory":
        source = content
    else:
        torch.save(content, source, _use_new_zipfile_serialization=suffix == "pth")
    same(visionhybrid.load(source), toy)
    assert visionhybrid.inspect(source).container == ("" if name == "raw" else name)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "netG.", "backbone.", "module._orig_mod.", "model.net."]
)
def test_common_prefixes_go(prefix, toy):
    state = {prefix + name: value for name, value in authors(toy).items()}
    same(visionhybrid.load({"state_dict": state}), toy)


def test_a_prefix_that_only_some_keys_have_stays(toy):
    state = {**authors(toy), "neck.conv.weight": torch.zeros(3)}
    state = {name if name.startswith("neck") else f"backbone.{name}": value for name, value in state.items()}
    with pytest.raises(
        ValueError, match=r"the part under 'backbone\.' is toy: load it with prefix='backbone\.'"
    ):
        visionhybrid.load(state)
    same(visionhybrid.load(state, prefix="backbone."), toy)


def test_wrappers_inside_names_and_the_counter_of_averaged_models_go(toy):
    compiled = {
        name.replace("layers.1.", "layers.1._orig_mod."): value for name, value in authors(toy).items()
    }
    same(visionhybrid.load(compiled), toy)
    averaged = torch.optim.swa_utils.AveragedModel(toy)
    same(visionhybrid.load(averaged.state_dict()), toy)


def test_key_chooses_and_inspect_tells_the_choice(toy):
    content = {"params": authors(toy), "params_ema": wrong(toy), "epoch": 4}
    found = visionhybrid.inspect(content)
    assert (found.container, found.alternatives, found.other) == (
        "params_ema",
        ("params",),
        ("epoch", "index_table")[:1],
    )
    same(visionhybrid.load(content, key="params"), toy)
    same(visionhybrid.load({"deep": content}, key="deep.params"), toy)
    with pytest.raises(ValueError, match="no entry 'parms'; weights are in 'params', 'params_ema'"):
        visionhybrid.load(content, key="parms")


def test_several_unknown_entries_are_an_error_that_names_them(toy):
    with pytest.raises(
        ValueError, match="several entries hold weights: 'student', 'teacher'; choose one with key="
    ):
        visionhybrid.load({"student": authors(toy), "teacher": authors(toy)})


def test_sparse_weights_are_named():
    state = {"a.weight": torch.eye(3).to_sparse(), "a.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"'a\.weight': sparse or quantised tensors are not read"):
        visionhybrid.load({"params": state})


# ---- files


def test_safetensors_under_any_name(toy, tmp_path):
    save_file({name: value.clone() for name, value in authors(toy).items()}, tmp_path / "weights.pth")
    same(visionhybrid.load(tmp_path / "weights.pth"), toy)
    assert visionhybrid.inspect(str(tmp_path / "weights.pth")).kind == "safetensors"


def test_what_authors_put_beside_the_weights_does_not_matter(toy, tmp_path):
    beside = {
        "args": argparse.Namespace(lr=np.float64(0.1)),
        "best": np.float32(82.5),
        "log": np.zeros(3),
        "arr": [1, "a"],
    }
    torch.save({"model": authors(toy), **beside}, tmp_path / "full.pth")
    same(visionhybrid.load(tmp_path / "full.pth"), toy)
    assert visionhybrid.inspect(tmp_path / "full.pth").other == ("args", "best", "log", "arr")


def test_numpy_1_names_of_scalars_are_known(toy, tmp_path):
    torch.save({"model": authors(toy), "best": np.float32(82.5)}, tmp_path / "new.pth")
    with (
        zipfile.ZipFile(tmp_path / "new.pth") as source,
        zipfile.ZipFile(tmp_path / "old.pth", "w") as target,
    ):
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(entry.filename, content)
    same(visionhybrid.load(tmp_path / "old.pth"), toy)


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("writer", ["zip", "old", "pickle 2", "pickle 4"])
def test_malicious_pickles_are_named_and_not_run(writer, toy, tmp_path):
    path, mark = tmp_path / "evil.pth", tmp_path / "mark"
    content = {"params": authors(toy), "extra": Evil(mark)}
    if writer.startswith("pickle"):
        path.write_bytes(pickle.dumps(Evil(mark), int(writer[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(ValueError, match=rf"evil\.pth: refused, it would run {os.name}\.system") as caught:
        visionhybrid.load(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_a_class_of_somebody_is_named(tmp_path):
    torch.save({"config": toyless()}, tmp_path / "config.pth")
    with pytest.raises(ValueError, match=r"refused, it would run fractions\.Fraction"):
        visionhybrid.load(tmp_path / "config.pth")


def toyless():
    from fractions import Fraction

    return Fraction(1, 3)


def damaged(kind, good_torch, good_safetensors):
    header = json.dumps({"a.b": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    return {
        "empty": b"",
        "one byte": b"\x80",
        "text": b"hello, this is not a checkpoint",
        "web page": b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "json": b'{"a": 1}',
        "torch cut early": good_torch[:700],
        "torch cut late": good_torch[:-30],
        "safetensors cut": good_safetensors[:-5],
        "safetensors header beyond the file": struct.pack("<Q", 1 << 26) + good_safetensors[8:],
        "safetensors header of an exabyte": struct.pack("<Q", 1 << 60) + good_safetensors[8:],
        "safetensors claims 4 TB": struct.pack("<Q", len(header)) + header,
        "old format cut": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
    }[kind]


DAMAGED = {
    "empty": "the file is empty",
    "one byte": "truncated or damaged",
    "text": "not a checkpoint, it begins with b'hello, t'",
    "web page": "a web page: the download failed",
    "lfs": "git lfs pull",
    "json": "not a checkpoint",
    "torch cut early": "truncated or damaged archive",
    "torch cut late": "truncated or damaged archive",
    "safetensors cut": "damaged safetensors",
    "safetensors header beyond the file": "damaged safetensors",
    "safetensors header of an exabyte": "damaged safetensors",
    "safetensors claims 4 TB": "damaged safetensors",
    "old format cut": "truncated or damaged",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_one_line_with_path_and_reason(kind, toy, tmp_path):
    torch.save(authors(toy), tmp_path / "good.pth")
    save_file(authors(toy), tmp_path / "good.safetensors")
    path = tmp_path / "bad.pth"
    path.write_bytes(
        damaged(kind, (tmp_path / "good.pth").read_bytes(), (tmp_path / "good.safetensors").read_bytes())
    )
    with pytest.raises(ValueError, match=DAMAGED[kind]) as caught:
        visionhybrid.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", range(0, 100, 7))
def test_every_truncation_of_every_format_is_a_value_error(keep, toy, tmp_path):
    for old in (False, True):
        torch.save(authors(toy), tmp_path / "good.pth", _use_new_zipfile_serialization=not old)
        whole = (tmp_path / "good.pth").read_bytes()
        (tmp_path / "cut.pth").write_bytes(whole[: len(whole) * keep // 100])
        with pytest.raises(ValueError, match=r"cut\.pth: "):
            visionhybrid.load(tmp_path / "cut.pth")


def test_zip_bombs_are_refused_before_they_unpack(toy, tmp_path):
    torch.save(authors(toy), tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for entry in good.infolist():
            bomb.writestr(entry.filename, good.read(entry))
        bomb.writestr("archive/data/99", b"\0" * 50_000_000, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="claim to unpack to"):
        visionhybrid.load(tmp_path / "bomb.pth")


def test_tensors_without_substance_are_refused(toy, tmp_path):
    """Zero strides: a tensor of 4 TB in a file of a few kB."""
    torch.save({**authors(toy), "stem.weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "thin.pth")
    with pytest.raises(ValueError, match="claim to hold"):
        visionhybrid.load(tmp_path / "thin.pth")


def test_a_layer_number_out_of_all_proportion_is_refused(toy):
    with pytest.raises(ValueError, match="counts further than"):
        visionhybrid.load({**authors(toy), "layers.999999999.lin.weight": torch.zeros(1)})


def test_other_archives_are_told_apart(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"a zip archive, but not one that torch\.save wrote"):
        visionhybrid.load(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(ValueError, match="a TorchScript program"):
        visionhybrid.load(tmp_path / "script.pt")


def test_no_such_file_and_wrong_types(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth: no such file"):
        visionhybrid.load(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="the path is empty"):
        visionhybrid.load("")
    with pytest.raises(ValueError, match="a path or a state dict is needed, got int"):
        visionhybrid.load(3)
    with pytest.raises(ValueError, match="holds a list where weights are expected"):
        visionhybrid.load({"a": [1]}, key="a")
    with pytest.raises(ValueError, match="holds no weights"):
        visionhybrid.load({"epoch": 3})


# ---- folders


def test_timm_hub_folder(toy, tmp_path):
    cfg = {"mean": [0.1, 0.2, 0.3], "input_size": [3, 32, 32]}
    config = {"architecture": "toy", "num_classes": 5, "label_names": list("abcde"), "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(authors(toy), tmp_path / "model.safetensors")
    model = visionhybrid.load(tmp_path)
    same(model, toy)
    assert model.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert model.pretrained_cfg["label_names"] == list("abcde")


def test_run_and_checkpoint_directories(toy, tmp_path):
    older, newer = (tmp_path / "checkpoints" / f"step_0000000{i}" for i in (1, 2))
    for folder, model in ((older, randomised(Toy(num_classes=5))), (newer, toy)):
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "ema.safetensors")
        save_file({k: v * 0 for k, v in model.state_dict().items()}, folder / "model.safetensors")
    same(visionhybrid.load(newer), toy)
    same(visionhybrid.load(tmp_path), toy)  # unfinished run: newest checkpoint, averaged weights
    assert not any(p.any() for p in visionhybrid.load(newer, key="model").parameters())
    save_file(toy.state_dict(), tmp_path / "model.safetensors")
    (older / "ema.safetensors").unlink()
    (newer / "ema.safetensors").unlink()
    same(visionhybrid.load(tmp_path), toy)  # finished run: the final weights


def test_hidden_options_come_from_the_config_of_a_run_or_hub_folder(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.VARIANTS, "vh_toy", {"depth": 3})
    toy.gain = 5.0
    for config in (
        {"model": {"name": "vh_toy", "options": {"gain": 5.0, "num_classes": 99}}},
        {"architecture": "vh_toy", "model_args": {"gain": 5.0}},
    ):
        step = tmp_path / "checkpoints" / "step_00000003"
        step.mkdir(parents=True, exist_ok=True)
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(toy.state_dict(), step / "ema.safetensors")
        same(visionhybrid.load(tmp_path), toy)
        same(visionhybrid.load(step), toy)


def test_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="a folder without weights"):
        visionhybrid.load(tmp_path)
