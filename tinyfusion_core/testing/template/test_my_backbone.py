"""The conformance checks of tinyfusion, one test for each."""

from my_backbone import MyBackbone, MyBackboneLoss

from tinyfusion_core.testing import parametrize_with_checks


@parametrize_with_checks([(MyBackbone, MyBackboneLoss)])
def test_conformance(check):
    check()
