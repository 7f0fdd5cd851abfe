"""The pages' measured numbers are those of the logs; a wrong one, and one that no log has, is found."""

from __future__ import annotations

import re

import check_claims
import pytest
from check_claims import ROOT, every_claim, fault, flat, uncovered
from claims.claim import SLOT, Claim

CLAIMS = every_claim()


def test_every_number_is_as_the_logs_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_claims.main() == 0
    assert capsys.readouterr().out == f"{len(CLAIMS)} of {len(CLAIMS)} claims as the logs say\n"


@pytest.mark.parametrize("page", sorted({claim.page for claim in CLAIMS}))
def test_a_wrong_digit_is_found(page: str) -> None:
    """Of every claim of the page: in each of its numbers another last digit."""
    text = flat((ROOT / page).read_text())
    for claim in (one for one in CLAIMS if one.page == page):
        said = claim.rendered()
        values = claim.values()
        assert len(values) == len(SLOT.findall(claim.text)) > 0, "every slot has a value"
        for wrong in range(len(values)):
            changed = list(values)
            value = values[wrong]
            changed[wrong] = f"{value}7" if isinstance(value, str) else value + 7
            other = Claim(page, claim.text, lambda changed=changed: changed)
            found = fault(claim, text.replace(said, other.rendered()))
            assert found is not None
            assert found.endswith(said)


def test_a_claim_that_its_page_does_not_make_is_found() -> None:
    claim = Claim("README.md", "takes {:.1f} times less", lambda: [3.6])
    assert fault(claim, "It takes 3.6 times less.") is None
    assert fault(claim, "It takes 3.60 times less.") is not None
    assert fault(claim, "It is fast.") == "README.md: does not say: takes 3.6 times less"


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        ("It takes 3.6 times less, on `2` GPUs, see [there](page-4.md).", 0),
        ("It takes 3.6 times less, and 99 % of users like it.", 1),
        ("```sh\nrun --n 5\n``` It takes 3.6 times less than in 1.5 s or 2e-5 s.", 2),
    ],
)
def test_numbers_without_a_claim_are_found(text: str, odd: int) -> None:
    claim = Claim("README.md", "takes {:.1f} times less", lambda: [3.6])
    found = uncovered("README.md", flat(text), [claim])
    assert len(found) == odd
    assert all(re.match(r"README.md: no claim computes the number in: ", line) for line in found)
