import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distillers.crd import CRD, Memory, contrast_loss, draw_negatives
from models import MODELS

ROOT = Path(__file__).parents[2]


def test_contrast_loss_against_the_definition():
    torch.manual_seed(0)
    scores, n = torch.rand(4, 1 + 6) / 10, 50
    total = 0.0
    for row in scores.double():
        total -= (row[0] / (row[0] + 6 / n)).log() + sum((1 - v / (v + 6 / n)).log() for v in row[1:])
    assert contrast_loss(scores, n).item() == pytest.approx(total.item() / 4, rel=1e-4)


def test_negatives_are_uniform_over_the_other_classes():
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 1, 1, 0, 2, -1, 1])
    drawn = draw_negatives(labels, torch.tensor([1, 2, 7]), 60000)
    assert drawn.shape == (3, 60000)
    for row, others in zip(drawn, ([0, 1, 4, 5, 6], [1, 2, 3, 4, 6, 7], range(8))):
        counts = row.bincount(minlength=8) / 60000
        expected = torch.tensor([1 / len(others) if i in others else 0.0 for i in range(8)])
        assert (counts - expected).abs().max() < 0.01 and not counts[expected == 0].any()


def memory(n=12, **arguments):
    torch.manual_seed(0)
    return Memory(n, 5, **({"negatives": 20, "temperature": 0.5, "momentum": 0.25} | arguments))


def batch():
    torch.manual_seed(1)
    return F.normalize(torch.randn(4, 5)), F.normalize(torch.randn(4, 5)), torch.tensor([0, 1, 1, 2]), torch.tensor(
        [7, 0, 3, 11])


def test_scores_loss_and_update_step_by_step():
    module, (s, t, targets, index) = memory(), batch()
    banks = module.student_bank.clone(), module.teacher_bank.clone()
    torch.manual_seed(2)
    s.requires_grad_()
    loss = module(s, t, targets, index)
    torch.manual_seed(2)
    chosen = torch.cat([index[:, None], draw_negatives(torch.full((12,), -1), targets, 20)], 1)
    expected = 0
    for which, (anchors, bank) in enumerate(((s, banks[1]), (t, banks[0]))):
        scores = torch.stack([torch.stack([(anchors[b] @ bank[i] / 0.5).exp() for i in chosen[b]]) for b in range(4)])
        assert module.Z[which].item() == pytest.approx(scores.mean().item() * 12, rel=1e-5)
        expected = expected + contrast_loss(scores / module.Z[which], 12)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for old, new, seen in (banks[0], module.student_bank, s), (banks[1], module.teacher_bank, t):
        moved = F.normalize(0.25 * old[index] + 0.75 * seen)
        assert torch.allclose(new[index], moved)
        rest = [i for i in range(12) if i not in index]
        assert torch.equal(new[rest], old[rest])
    assert module.labels[index].tolist() == targets.tolist() and (module.labels == -1).sum() == 8
    loss.backward()  # the bank has moved since; the gradient is that of the bank before
    (expected_grad,) = torch.autograd.grad(expected, s)
    assert torch.allclose(s.grad, expected_grad, atol=1e-5)


def test_the_banks_start_uniform_with_rows_of_length_one_in_the_mean():
    torch.manual_seed(0)
    module = Memory(4000, 12, negatives=20, temperature=0.5, momentum=0.25)
    for bank in module.student_bank, module.teacher_bank:
        assert 0.49 < bank.max() <= 0.5 and -0.5 <= bank.min() < -0.49  # ± √(3 / 12)
        assert bank.square().sum(1).mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(module.student_bank, module.teacher_bank)


def test_in_float32_under_autocast():
    losses = []
    for enabled in False, True:
        module, (s, t, targets, index) = memory(), batch()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(module(s, t, targets, index).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_constants_are_set_once():
    module, (s, t, targets, index) = memory(), batch()
    module(s, t, targets, index)
    before = module.Z.clone()
    module(-s, t, targets, index)
    assert torch.equal(module.Z, before) and (before > 0).all()
    assert {"student_bank", "teacher_bank", "labels", "Z"} == set(module.state_dict())


CODE = '''
import sys
import torch, torch.distributed as dist
from distillers.crd import Memory
dist.init_process_group("gloo")
torch.manual_seed(0)
module = Memory(12, 5, negatives=20, temperature=0.5, momentum=0.25)
rank = dist.get_rank()
generator = torch.Generator().manual_seed(1)
for step in range(3):  # two processes with two images each, as one has four
    s, t = (torch.nn.functional.normalize(torch.randn(4, 5, generator=generator)) for _ in range(2))
    targets, index = torch.randint(3, (4,), generator=generator), torch.randperm(12, generator=generator)[:4]
    mine = slice(rank, None, dist.get_world_size())
    torch.manual_seed(10 * step + rank)
    module(s[mine], t[mine], targets[mine], index[mine])
state = module.state_dict()
torch.save(state, f"{sys.argv[1]}/{dist.get_world_size()}_{rank}.pth")
dist.destroy_process_group()
'''


def test_two_processes_have_the_banks_of_one(tmp_path):
    (tmp_path / "job.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{CODE}")
    for processes in 1, 2:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone",
                   str(tmp_path / "job.py"), str(tmp_path)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    one, *two = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    for state in two:
        for key in "student_bank", "teacher_bank", "labels":
            assert torch.equal(state[key], one[key])
    assert torch.equal(two[0]["Z"], two[1]["Z"])


def test_the_loss_is_the_memorys_of_embeddings_of_length_one():
    torch.manual_seed(0)
    distiller = CRD(MODELS["resnet8"](), MODELS["resnet8x4"](), crd_weight=3.0, dim=16, negatives=8, temperature=0.5,
                    momentum=0.25, num_samples=20).eval()
    distiller.memory.train()
    memory = Memory(20, 16, negatives=8, temperature=0.5, momentum=0.25)
    memory.load_state_dict(distiller.memory.state_dict())
    images, targets, index = torch.randn(4, 3, 32, 32), torch.arange(4), torch.tensor([3, 19, 0, 7])
    s, t = (network(images, return_features=True)[1]["pooled"] for network in (distiller.student, distiller.teacher))
    s, t = distiller.student_embed(s), distiller.teacher_embed(t)
    torch.manual_seed(1)
    expected = 3 * memory(s / s.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True), targets, index)
    torch.manual_seed(1)
    assert distiller(images, targets, index)[1]["crd"].item() == pytest.approx(expected.item(), rel=1e-4)
    for name in "student_bank", "teacher_bank":
        torch.testing.assert_close(getattr(distiller.memory, name), getattr(memory, name))


def test_the_index_says_which_images_these_are():
    torch.manual_seed(0)
    distiller = CRD(MODELS["resnet8"](), MODELS["resnet14"](), num_samples=20, negatives=8, dim=16)
    before = distiller.memory.teacher_bank.clone()
    distiller(torch.randn(4, 3, 32, 32), torch.arange(4), torch.tensor([3, 19, 0, 7]))
    moved = (distiller.memory.teacher_bank != before).any(1).nonzero().flatten()
    assert moved.tolist() == [0, 3, 7, 19]
    assert torch.allclose(distiller.memory.teacher_bank[moved].norm(dim=1), torch.ones(4))


def test_images_that_are_not_trained_on_leave_no_trace():
    torch.manual_seed(0)
    distiller = CRD(MODELS["resnet8"](), MODELS["resnet14"](), num_samples=20, negatives=8, dim=16).eval()
    before = {key: value.clone() for key, value in distiller.memory.state_dict().items()}
    batch = torch.randn(4, 3, 32, 32), torch.arange(4), torch.tensor([3, 19, 0, 7])
    assert distiller(*batch)[1]["crd"].isfinite()  # with constants of its own: there are none yet
    assert all(torch.equal(value, before[key]) for key, value in distiller.memory.state_dict().items())
    distiller.train()(*batch)
    assert not any(torch.equal(value, before[key]) for key, value in distiller.memory.state_dict().items())


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"momentum": 1.0}, {"negatives": 0}, {"crd_weight": -1.0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CRD(MODELS["plaincnn2"](), MODELS["plaincnn2"](), **arguments)
