"""What tinyfusion expects of a plugin, a test for each expectation."""

from my_backbone import MyBackbone, MyBackboneLoss

from tinyfusion_core.testing import parametrize_with_checks


@parametrize_with_checks([(MyBackbone, MyBackboneLoss)])
def test_conformance(check):
    check()
