"""When a checkpoint is due."""

from pipeline.training.checkpoint_timer import CheckpointTimer


def test_a_checkpoint_is_due_after_the_maximum_number_of_steps() -> None:
    timer = CheckpointTimer(max_steps=3, max_seconds=1e9)
    assert [timer.step() for _ in range(3)] == [False, False, True]
    timer.restart()
    assert not timer.step()


def test_a_checkpoint_is_due_after_the_maximum_number_of_seconds() -> None:
    assert CheckpointTimer(max_steps=10**9, max_seconds=-1.0).step()
