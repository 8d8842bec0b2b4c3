"""The monitor records what spp measures, when it should, at the cost it promises, and leaves training as it is."""

import copy
import io
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import normfree
from normfree.signal import SignalHistory, SignalMonitor, monitor, spp
from normfree.signal.monitor import lightning_callback, transformers_callback
from normfree.signal.propagation import BlockSignal, Entry, Finding, SignalPropagation


class Residual(nn.Module):
    """Two residual blocks with all that a measurement could leave traces in."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6)) for _ in range(2)
        )
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = x + self.gain * branch(x)
        return x


def built(seed=0):
    torch.manual_seed(seed)
    model = Residual()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


PROBE = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))


def train(model, optimizer, steps, after=lambda: None, wrapped=None):
    """Draws its data from the global generator, so that a draw of anybody else's would show."""
    for _ in range(steps):
        optimizer.zero_grad()
        (wrapped or model)(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        after()


def test_records_every_k_steps_what_spp_measures():
    model, optimizer = built()
    seen = []
    with SignalMonitor(model, PROBE, every=3, name="net") as monitor:
        train(model, optimizer, 7, lambda: seen.append(monitor.step()))
        assert monitor.history.steps == [0, 3, 6]
        assert seen[2] is monitor.history[1][1] and seen[:2] == [None, None]
    assert monitor.history.steps == [0, 3, 6, 7] and monitor.steps == 7  # the last one at the end
    assert monitor.history[-1][1] == spp(model, PROBE, wake=False, gradient=False, name="net")
    first = monitor.history[0][1]
    assert first.blocks[1].avg_channel_var == first.entry.avg_channel_var and not first.blocks[1].woken  # as it is


def test_training_is_bit_identical_with_and_without():
    plain, optimizer = built()
    train(plain, optimizer, 6)
    model, optimizer = built()
    with SignalMonitor(model, PROBE, every=1, gradient=True) as monitor:
        train(model, optimizer, 6, monitor.step)
    for (name, one), other in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("clipped", "excluded"), [(False, False), (True, False), (True, True)])
def test_gains_that_clipping_keeps_at_zero_are_found_and_the_remedy_moves_them(clipped, excluded, tmp_path):
    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 1, 1), "widths": (16, 16, 32, 32), "stem": "cifar", "drop_rate": 0, "stochdepth_rate": 0}
    model = normfree.create_model("nf_resnet50", num_classes=4, **sizes)
    gains = [name for name, _ in model.named_parameters() if name.endswith("skip_gain")]
    optimizer = normfree.optim.nesterov_sgd(model, lr=0.1)
    if clipped:
        exclude = [*(gains if excluded else ()), *normfree.optim.final_layers(model)]
        optimizer = normfree.optim.AdaptiveGradientClipping(optimizer, model, clip_factor=0.01, exclude=exclude)
    images = torch.randn(32, 3, 8, 8)
    labels = (images[:, 0].mean((1, 2)) > 0).long() + 2 * (images[:, 1].mean((1, 2)) > 0).long()
    with SignalMonitor(model, images[:8], every=50) as watched:
        for step in range(120):
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step()
            if step == 60:  # an interrupted run goes on
                state = json.loads(json.dumps(watched.state_dict()))
                watched.load_state_dict(state)
    found = [(one.first, one.ongoing, one.finding) for one in watched.history.episodes()]
    if clipped and not excluded:
        ((first, ongoing, finding),) = found
        assert (finding.kind, finding.severity, first, ongoing) == ("silenced_branch", "warning", 100, True)
        assert finding.message.startswith("4 of 4 gains that began at zero are below 0.01 after 100 steps, first stage")
        assert "exclude=" in finding.remedy and finding.docs == "docs/signal.md#silenced_branch"
        assert "4 of 4 gains that began at zero" in watched.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    else:
        assert found == []
        assert all(abs(model.get_parameter(name).item()) > 0.01 for name in gains)


def test_the_probe_stays_what_it_was_whatever_the_loop_does_to_it():
    model, _ = built()
    probe = PROBE.clone()
    monitor = SignalMonitor(model, probe, every=1)
    monitor.start()
    probe.zero_()
    assert monitor.step().entry == monitor.history[0][1].entry


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_without_every_it_stays_within_its_share_of_the_time(monkeypatch):
    """A measurement that costs 0.3 s, steps of 0.02 s: at 1 % one may follow every 30 s."""
    clock, signal = Clock(), made()

    def costly(*_, **__):
        clock.now += 0.3
        return signal

    monkeypatch.setattr(monitor, "perf_counter", clock)
    monkeypatch.setattr(monitor, "spp", costly)
    listening = SignalMonitor(nn.Linear(2, 2), PROBE)
    listening.start()
    for _ in range(30_000):
        clock.now += 0.02
        listening.step()
        assert listening.cost <= 0.01 or len(listening.history) == 1
    assert len(listening.history) == 20 and listening.cost > 0.0095  # 606 s, a hundredth of it
    assert all(
        26 < (b - a) * 0.02 < 61 for a, b in zip(listening.history.steps, listening.history.steps[1:], strict=False)
    )


def test_a_loop_that_counts_its_steps_itself():
    model, _ = built()
    monitor = SignalMonitor(model, PROBE, every=10)
    for steps in (4, 9, 13, 13, 19, 25):  # as with accumulation, or several steps a call
        monitor.step(steps)
    assert monitor.history.steps == [0, 13, 25]


def test_an_error_in_the_loop_passes_and_records_nothing_more():
    model, _ = built()
    monitor = SignalMonitor(model, PROBE, every=5)

    def fail():
        with monitor:
            monitor.step()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert monitor.history.steps == [0]


def test_weights_that_become_infinite_are_told_and_do_not_end_the_run():
    model, _ = built()
    with SignalMonitor(model, PROBE, every=1) as monitor:
        model.gain.data.fill_(math.inf)
        with pytest.warns(UserWarning, match=r"step 1 could not be measured.*gain"):
            assert monitor.step() is None
        model.gain.data.fill_(1.0)
        monitor.step()
    assert monitor.history.steps == [0, 2]
    ((step, message),) = monitor.failures
    assert step == 1 and "gain" in message


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: m])
def test_wrapped_models_are_listened_to_inside(wrap):
    model, _ = built()
    with SignalMonitor(wrap(model), PROBE, every=1) as monitor:
        pass
    assert monitor.model is model and len(monitor.history[0][1].blocks) == 2


def test_gaussian_noise_if_no_batch_is_given_and_always_the_same():
    model, _ = built()
    with SignalMonitor(model, every=1) as monitor:
        monitor.step()
    assert monitor.history[0][1] == monitor.history[1][1]


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value


def test_tensorboard_scalars():
    model, optimizer = built()
    writer = Writer()
    with SignalMonitor(model, PROBE, every=2, writer=writer, tag="spp") as monitor:
        train(model, optimizer, 2, monitor.step)
    signal = monitor.history[1][1]
    assert writer.scalars["spp/avg_channel_var/entry", 2] == signal.entry.avg_channel_var
    assert writer.scalars["spp/avg_channel_var/001", 2] == signal.blocks[1].avg_channel_var
    assert writer.scalars["spp/residual_avg_channel_var/000", 2] == signal.blocks[0].residual_avg_channel_var
    assert not any("gradient" in tag for tag, _ in writer.scalars)  # was not asked for
    assert 0 < writer.scalars["spp/cost", 2] < 1


def test_a_summary_writer_takes_them(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model, _ = built()
    with tensorboard.SummaryWriter(str(tmp_path)) as writer, SignalMonitor(model, PROBE, writer=writer):
        pass
    assert list(tmp_path.iterdir())


def test_interrupted_and_resumed_equals_uninterrupted():
    def records(monitor):
        return [(step, signal.blocks) for step, signal in monitor.history]

    model, optimizer = built()
    with SignalMonitor(model, PROBE, every=2) as whole:
        train(model, optimizer, 8, whole.step)
    model, optimizer = built()
    first = SignalMonitor(model, PROBE, every=2)
    train(model, optimizer, 5, first.step)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    state = json.loads(json.dumps(first.state_dict()))
    second = SignalMonitor(model, PROBE, every=2)
    second.load_state_dict(state)
    with second:
        train(model, optimizer, 3, second.step)
    assert second.history.steps == [0, 2, 4, 6, 8] and second.elapsed > first.elapsed - 1
    assert records(second)[:3] == records(first)
    assert second.steps == whole.steps == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: 0"),
        ({"share": 0.0}, "share: 0.0"),
        ({"mode": "trian"}, "mode='trian'.*'train'"),
        ({"batch": [PROBE]}, r"batch: list.*next\(iter\(loader\)\)"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SignalMonitor(built()[0], **{"batch": PROBE, **options})
    with pytest.raises(ValueError, match="Linear failed"):
        SignalMonitor(nn.Linear(3, 2), PROBE).start()
    with pytest.raises(ValueError, match="lacks"):
        SignalMonitor(built()[0]).load_state_dict(SignalHistory().to_dict())


def made(variance=1.0, *findings):
    """A plot of one block."""
    entry = Entry(name="a", shape=(2, 3), channel_axis=1, avg_channel_sq_mean=0.0, avg_channel_var=1.0)
    block = BlockSignal(
        index=0, name="b", kind="residual", shape=(2, 3), channel_axis=1, transition=False,
        avg_channel_sq_mean=-0.0, avg_channel_var=variance, residual_avg_channel_var=1 / 3, woken=("g",),
    )  # fmt: skip
    return SignalPropagation(
        model="m", mode="eval", input={"shape": [2, 3]}, entry=entry, blocks=(block,), findings=findings
    )


@pytest.mark.parametrize("variance", [0.1 + 0.2, math.inf, -math.inf, math.nan, 5e-324])
def test_json_is_exact(tmp_path, variance):
    note = Finding(kind="explosion", severity="error", block=0, message="m", remedy="r")
    history = SignalHistory([(0, made()), (7, replace(made(variance, note), configuration={"x": math.inf}))])
    loaded = SignalHistory.load(history.to_json(tmp_path / "history.json"))
    assert type(loaded[1][1].blocks[0].shape) is tuple
    assert repr(loaded) == repr(history)  # which tells nan, inf and the sign of zero apart
    if not math.isnan(variance):
        assert loaded == history
    json.loads((tmp_path / "history.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a").write_text('{"schema": 2, "history": []}')
    for name, message in (("a", "schema 2"), ("b", "is no file")):
        with pytest.raises(ValueError, match=message):
            SignalHistory.load(tmp_path / name)


def finding(kind, severity="error"):
    return Finding(kind=kind, severity=severity, block=0, message=f"{kind} {severity}", remedy="r")


def test_findings_of_training_are_those_that_are_ill_at_any_step():
    history = SignalHistory(
        [
            (0, made(1.0, finding("silenced_branch", "warning"), finding("mean_shift"))),
            (10, made(1.0, finding("explosion", "warning"))),
            (20, made(1.0, finding("explosion"), finding("branch_variance", "warning"))),
            (30, made(1.0, finding("dead_channels", "info"))),
            (40, made(1.0, finding("explosion", "warning"), finding("silenced_branch", "warning"))),
        ]
    )
    told = [(e.first, e.last, e.ongoing, e.finding.message) for e in history.episodes()]
    assert told == [
        (10, 20, False, "explosion error"),
        (40, 40, True, "explosion warning"),
        (40, 40, True, "silenced_branch warning"),
    ]


def test_a_branch_that_dies_in_training_is_found():
    model, optimizer = built()
    with SignalMonitor(model, PROBE, every=1) as monitor:
        train(model, optimizer, 2, monitor.step)
        assert monitor.history.episodes() == []  # silent at the start, on purpose
        with torch.no_grad():
            model.branches[1][3].weight.zero_(), model.branches[1][3].bias.zero_()
        monitor.step()
    (episode,) = monitor.history.episodes()
    assert (episode.finding.kind, episode.finding.block, episode.first, episode.ongoing) == (
        "silenced_branch",
        1,
        3,
        True,
    )


def test_it_copies_nothing_of_the_model_and_needs_torch_alone():
    model, _ = built()
    twin = copy.deepcopy(model.state_dict())
    with SignalMonitor(model, PROBE, every=1):
        pass
    assert all(torch.equal(twin[name], value) for name, value in model.state_dict().items())
    assert normfree.SignalMonitor is SignalMonitor


def test_fabric_callback():
    fabric_module = pytest.importorskip("lightning.fabric")
    from normfree.signal.monitor import SignalCallback

    model, optimizer = built()
    monitor = SignalMonitor(model, PROBE, every=2)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, callbacks=[SignalCallback(monitor)])
    wrapped, optimizer = fabric.setup(model, optimizer)
    assert SignalMonitor(wrapped, PROBE).model is model
    fabric.call("on_train_start")
    train(model, optimizer, 3, lambda: fabric.call("on_train_batch_end", loss=0.0), wrapped=wrapped)
    fabric.call("on_train_end")
    assert monitor.history.steps == [0, 2, 3]


@pytest.mark.filterwarnings("ignore")  # of the trainer's own
def test_lightning_callback_counts_optimizer_steps():
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = built()[0]

        def training_step(self, batch, _):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    task = Task()
    monitor = SignalMonitor(task.net, PROBE, every=2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(48, 4)), batch_size=4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, callbacks=[lightning_callback(monitor)], **quiet
    )
    trainer.fit(task, loader)
    assert monitor.history.steps == [0, 2, 4, 6]


class LossOf(nn.Module):
    """A model as Hugging Face's Trainer takes it."""

    def __init__(self):
        super().__init__()
        self.net = built()[0]

    def forward(self, inputs, labels):
        return {"loss": (self.net(inputs) - labels).square().mean()}


@pytest.mark.filterwarnings("ignore")  # of the trainer's own
def test_transformers_callback_counts_optimizer_steps_and_goes_on(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    examples = [{"inputs": torch.randn(4), "labels": torch.zeros(6)} for _ in range(48)]

    def trained(folder, steps, **options):
        torch.manual_seed(0)
        model = LossOf()
        monitor = SignalMonitor(model.net, PROBE, every=2)
        arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=steps, use_cpu=True,
            save_steps=3, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        callback = transformers_callback(monitor)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[callback])
        trainer.train(**options)
        return monitor

    whole = trained(tmp_path / "whole", 6)
    assert whole.history.steps == [0, 2, 4, 6]
    trained(tmp_path / "part", 3)
    part = trained(tmp_path / "part", 6, resume_from_checkpoint=True)
    # The first part ended at 3, and the record of its last step came after its checkpoint.
    assert part.history.steps == [0, 2, 4, 6] and part.history[:2] == whole.history[:2]


def test_transformers_callback_takes_the_trainers_events(tmp_path, monkeypatch):
    """As the trainer calls them, without it."""
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(TrainerCallback=type("TrainerCallback", (), {})))
    model, optimizer = built()
    monitor = SignalMonitor(model, PROBE, every=2)
    callback = transformers_callback(monitor)
    arguments, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=0)
    assert type(callback).__mro__[-2].__name__ == "TrainerCallback"
    callback.on_train_begin(arguments, state, None, model=model)

    def step():
        state.global_step += 1
        callback.on_step_end(arguments, state, None, model=model)

    train(model, optimizer, 3, step)
    for first, files in ((False, 0), (True, 1)):
        state.is_world_process_zero = first
        callback.on_save(arguments, state, None)
        assert len(list(tmp_path.rglob("*.json"))) == files
    again = SignalMonitor(built()[0], PROBE, every=2)
    resumed = transformers_callback(again)
    resumed.on_train_begin(arguments, state, None)
    assert again.history == monitor.history and again.steps == 3
    resumed.on_train_end(arguments, state, None)
    assert again.history.steps == [0, 2, 3]
    for begun in (0, 5):  # in a folder without a file of the monitor's
        model, optimizer = built()
        fresh, state = SignalMonitor(model, PROBE, every=2), SimpleNamespace(global_step=begun)
        callback = transformers_callback(fresh)
        callback.on_train_begin(arguments, state, None)
        train(model, optimizer, 4, step)
        assert fresh.history.steps == ([0, 2, 4] if begun == 0 else [5, 6, 8])


@pytest.mark.parametrize(
    ("make", "package"), [(lightning_callback, "lightning"), (transformers_callback, "transformers")]
)
def test_what_is_missing_is_named(make, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{make.__name__} needs {package}, which is not installed; pip install"):
        make(SignalMonitor(built()[0], PROBE))
