import torch

from steppe.core.seeding import derive, generator


def test_streams_are_functions_of_seed_and_name():
    assert torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "a")))
    seen = {
        derive(seed, *names) for seed in range(3) for names in (("a",), ("b",), ("a", 1), ("a", 2), ("a1",))
    }
    assert len(seen) == 15


def test_the_global_rng_is_untouched():
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(1, "a"))
    assert torch.equal(before, torch.get_rng_state())


def test_streams_never_change():
    # written down once: a changed derivation would change every study's results
    assert derive(0, "batches", 1) == 6177566766931204045
