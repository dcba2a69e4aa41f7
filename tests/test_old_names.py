"""Names that scripts of the release before use: they work, and say what to write."""

import subprocess
import sys


def test_old_import_of_the_modifier_warns_and_works() -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import nbl_modifier.modifier as old\n"
            "from nbl_modifier import NBLModifier\n"
            "print(old.NBLModifier is NBLModifier)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "True"
    assert "FutureWarning: nbl_modifier.modifier is going to be removed" in (
        result.stderr
    )
    assert "from nbl_modifier import NBLModifier" in result.stderr
