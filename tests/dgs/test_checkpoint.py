"""States on disk: what is written is read, what is damaged is refused, crashes leave the last."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import dgs
from dgs.checkpoint import read_state, state_file, write_state
from dgs.config import WorkerConfig
from dgs.errors import ConfigError
from tests.helpers.training import Batches, flat, make_model, train_step, wrap

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.binary()
)
STATES = st.dictionaries(
    st.text(st.characters(codec="utf-8")) | st.integers(),
    st.recursive(
        PLAIN,
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(st.text(st.characters(codec="utf-8")) | st.integers(), inner)
        ),
        max_leaves=20,
    ),
    max_size=5,
)
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def small_state() -> dict[str, Any]:
    return {"steps": 3, "lr": 0.1, "velocity": torch.tensor([1.0, -2.0]), "local": [torch.ones(3)]}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STATES)
def test_every_nested_state_comes_back(tmp_path: Path, state: dict[Any, Any]) -> None:
    path = tmp_path / "a.safetensors"
    write_state(path, state)
    found = read_state(path)
    assert found == state
    assert repr(found) == repr(state)  # also types, signs of zeros, and the order of keys


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_any_type_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    patterns = torch.arange(240, dtype=torch.uint8) * 7
    values = patterns.bool() if dtype is torch.bool else patterns.view(dtype)
    tensors = [values, values[0], values[:0].reshape(0, 4), values[2:], values[::2]]
    write_state(tmp_path / "a", {"tensors": tensors, "again": values})
    found = read_state(tmp_path / "a")
    for before, after in zip([*tensors, values], [*found["tensors"], found["again"]], strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert torch.equal(bits(after), bits(before))


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    write_state(tmp_path / "a", {"a": math.inf, "b": -math.inf, "c": math.nan})
    found = read_state(tmp_path / "a")
    assert (found["a"], found["b"], math.isnan(found["c"])) == (math.inf, -math.inf, True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, {2: object()}]}, r"the state\['a'\]\[1\]\[2\] is a object, which a checkpoint"),
        ({"a": {1.5: 0}}, r"the state\['a'\] has the key 1.5; keys are strings or whole numbers"),
        ({"a": torch.ones(2).to_sparse()}, r"the state\['a'\] is a sparse or quantized tensor"),
    ],
)
def test_what_cannot_be_stored_is_named_and_the_file_stays(
    state: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_state(tmp_path / "a", {"steps": 3})
    with pytest.raises(ConfigError, match=message):
        write_state(tmp_path / "a", state)
    assert read_state(tmp_path / "a") == {"steps": 3}


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match=r"cannot write checkpoint .*taken/a: .* Make room or"):
        write_state(tmp_path / "taken" / "a", small_state())
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot write checkpoint"):
        write_state(tmp_path / "folder", small_state())
    assert sorted(os.listdir(tmp_path)) == ["folder", "taken"]


def test_nothing_but_the_file_is_left_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    for _ in range(2):
        write_state(path, small_state())
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_a_file_that_a_crash_left_half_written_harms_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_state(path, {"steps": 3})
    (tmp_path / "a.new").write_bytes(path.read_bytes()[:40])
    assert read_state(path) == {"steps": 3}
    write_state(path, {"steps": 4})
    assert read_state(path) == {"steps": 4}
    assert os.listdir(tmp_path) == ["a"]


def test_every_changed_byte_and_every_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_state(path, small_state())
    data = path.read_bytes()
    wanted = r"checkpoint .*a.safetensors is damaged, or not one of a worker.* Delete it to start"
    flipped = [data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :] for i in range(len(data))]
    for damaged in (*flipped, *(data[:i] for i in range(len(data))), data + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=wanted):
            read_state(path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"0": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match="it is not of the format 'dgs-state-1'"):
        read_state(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match="is damaged, or not one of a worker"):
        read_state(path)
    with pytest.raises(ConfigError, match=r"cannot read checkpoint .*missing: No such file"):
        read_state(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"cannot read checkpoint .*: Is a directory"):
        read_state(tmp_path)


def test_a_folder_holds_one_file_per_worker(tmp_path: Path) -> None:
    there, new = tmp_path, f"{tmp_path}/new/"
    assert state_file(there, "w0") == tmp_path / "w0.safetensors"
    assert state_file(new, "w0") == tmp_path / "new" / "w0.safetensors"
    names = ["../a", "a/b", "a%2Fb", "..", "a b", "\u00e9"]
    files = {state_file(there, name) for name in names}
    assert len(files) == len(names)
    assert {f.parent for f in files} == {tmp_path}
    assert state_file(tmp_path / "file", "") == tmp_path / "file"
    with pytest.raises(ConfigError, match=r"is a folder, .* give worker=NAME, set DGS_WORKER"):
        state_file(new, "")


# --- the optimizer's own ---------------------------------------------------------------------


def trained(path: Path, steps: int, **settings: Any) -> tuple[dgs.ParameterServer, Tensor]:
    """Train worker "w" with a checkpoint; return its server and its parameters."""
    server, model, data = dgs.ParameterServer(), make_model(), Batches()
    opt = wrap(model, server, worker="w", checkpoint=path, **settings)
    for _ in range(steps):
        train_step(model, opt, data)
    opt.close(leave=False)
    return server, flat(model)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("every", [0, 1, 3])
def test_a_new_process_goes_on_with_the_checkpoint_of_the_last(
    every: int, overlap: bool, tmp_path: Path
) -> None:
    server, expected = trained(tmp_path, 5, checkpoint_every=every, overlap=overlap)
    model = make_model(9)
    again = wrap(model, server, worker="w", checkpoint=tmp_path, overlap=overlap)
    assert torch.equal(flat(model), expected)
    assert (again.stats.rejoins, again.stats.replaced, again.stats.steps) == (0, 0, 5)
    assert again.stats.exchanges == server.version == 5
    train_step(model, again, Batches(1))
    again.close()


@pytest.mark.parametrize(("overlap", "local_steps"), [(False, 1), (False, 2), (True, 1)])
def test_checkpoints_come_every_so_many_exchanges(
    overlap: bool, local_steps: int, tmp_path: Path
) -> None:
    path, written = tmp_path / "w", []
    model, data = make_model(), Batches()
    settings: dict[str, Any] = {"overlap": overlap, "local_steps": local_steps}
    opt = wrap(
        model, dgs.ParameterServer(), worker="w", checkpoint=path, checkpoint_every=3, **settings
    )
    for step in range(1, 7 * local_steps + 1):
        train_step(model, opt, data)
        if path.exists():
            written.append(step)
            path.unlink()
    assert written == [3 * local_steps, 6 * local_steps]
    opt.save()
    assert path.exists()
    path.unlink()
    opt.close()
    assert path.exists()
    path.unlink()
    opt.close()
    assert not path.exists()


@pytest.mark.parametrize("overlap", [False, True])
def test_writing_checkpoints_changes_no_bit_of_training(overlap: bool, tmp_path: Path) -> None:
    _, without = trained(tmp_path / "a", 7, overlap=overlap)
    _, with_all = trained(tmp_path / "b", 7, overlap=overlap, checkpoint_every=1)
    assert torch.equal(with_all, without)


def test_a_damaged_checkpoint_stops_the_start_before_anything_has_changed(tmp_path: Path) -> None:
    server, _ = trained(tmp_path / "w", 3)
    before = server.handle("Status", b"")
    data = (tmp_path / "w").read_bytes()
    for damaged in (b"", data[:-7], data[:1000], b"junk" * 10):
        (tmp_path / "w").write_bytes(damaged)
        model = make_model(4)
        untouched = flat(model)
        with pytest.raises(ConfigError, match=r"is damaged, .* Delete it to start without it"):
            wrap(model, server, worker="w", checkpoint=tmp_path / "w")
        assert torch.equal(flat(model), untouched)
        assert (tmp_path / "w").read_bytes() == damaged
        assert server.handle("Status", b"") == before
    (tmp_path / "w").write_bytes(data)
    again = wrap(make_model(4), server, worker="w", checkpoint=tmp_path / "w")
    assert again.stats.rejoins == 0
    assert server.version == 3
    again.close()


def test_a_checkpoint_of_something_else_is_refused_and_its_session_stays(tmp_path: Path) -> None:
    server, _ = trained(tmp_path / "w", 3)
    with pytest.raises(ConfigError, match="use the rule that the state was saved with"):
        wrap(make_model(), server, worker="w", checkpoint=tmp_path / "w", rule="dgc")
    with pytest.raises(ConfigError, match="is of worker 'w', this one is 'x'; end the path with"):
        wrap(make_model(), server, worker="x", checkpoint=tmp_path / "w")
    write_state(tmp_path / "v", {"steps": 1})
    with pytest.raises(ConfigError, match=r"not the state of a dgs\.DistributedOptimizer"):
        wrap(make_model(), server, worker="v", checkpoint=tmp_path / "v")
    again = wrap(make_model(4), server, worker="w", checkpoint=tmp_path / "w")
    assert again.stats.rejoins == 0
    again.close()


def test_a_checkpoint_that_cannot_be_written_loses_no_step(tmp_path: Path) -> None:
    server, model, data = dgs.ParameterServer(), make_model(), Batches()
    place = tmp_path / "folder" / "w"
    opt = wrap(model, server, worker="w", checkpoint=place, checkpoint_every=1)
    (tmp_path / "folder").touch()
    with pytest.raises(ConfigError, match="cannot write checkpoint"):
        train_step(model, opt, data)
    (tmp_path / "folder").unlink()
    train_step(model, opt, data)
    assert (server.version, opt.stats.exchanges, opt.stats.resyncs) == (2, 2, 0)
    opt.close()


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint_every=2 .* give checkpoint=PATH as well"):
        WorkerConfig(checkpoint_every=2)
    with pytest.raises(ConfigError, match="checkpoint_every=-1"):
        WorkerConfig(checkpoint="a", checkpoint_every=-1)
    with pytest.raises(ConfigError, match="checkpoint=3 is not valid: give a path"):
        WorkerConfig(checkpoint=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give worker=NAME"):
        wrap(make_model(), dgs.ParameterServer(), checkpoint=tmp_path)
    opt = wrap(make_model(), dgs.ParameterServer())
    with pytest.raises(ConfigError, match="there is no place for a checkpoint"):
        opt.save()
    opt.close()
