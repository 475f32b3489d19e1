from __future__ import annotations

import pytest

from integration_tests.mesh import tools


def test_a_package_that_cannot_be_had_skips_with_its_reason() -> None:
    tool = tools.PythonTool("absent", ("blockyard-has-no-such-package==1",), "bin/absent")
    with pytest.raises(pytest.skip.Exception, match=r"absent cannot be had: .*no-such-package"):
        tools.need(tool)
