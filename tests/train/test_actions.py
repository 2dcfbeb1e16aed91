import pytest

from trainer.train.actions import Action, Every, due


@pytest.mark.parametrize(("interval", "steps"), [(4, [4, 8, 10]), (5, [5, 10]), (0, []), (20, [10])])
def test_every_is_due_at_multiples_and_at_the_end(interval: int, steps: list[int]) -> None:
    every = Every(interval, last=10)
    assert [step for step in range(1, 11) if every.due(step)] == steps


@pytest.mark.parametrize("interval", [0, 1, 3, 4, 20])
def test_next_after_is_the_next_due_step(interval: int) -> None:
    every = Every(interval, last=10)
    for step in range(10):
        expected = next((later for later in range(step + 1, 11) if every.due(later)), 10)
        assert every.next_after(step) == expected


def test_due_actions_keep_their_order() -> None:
    calls: list[str] = []
    actions = [Action(Every(n, 12), lambda step, n=n: calls.append(f"{n}@{step}")) for n in (6, 2, 3)]  # type: ignore[misc]
    for step in (2, 3, 6):
        for action in due(actions, step):
            action.call(step)
    assert calls == ["2@2", "3@3", "6@6", "2@6", "3@6"]
