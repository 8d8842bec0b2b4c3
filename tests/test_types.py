"""What `typed_example.py` shows type checkers also happens: pyright reads it in `make lint`."""

import ast
import inspect

import pytest
import typed_example


def test_the_typed_example_runs(tmp_path):
    typed_example.use(tmp_path)
    assert (tmp_path / "record.json").exists() and (tmp_path / "model.pt2").exists()


def test_what_type_checkers_refuse_is_refused_when_it_runs():
    function = ast.parse(inspect.getsource(typed_example.misuse)).body[0]
    (docstring, given, *calls), names = function.body, dict(vars(typed_example))
    exec(compile(ast.Module([docstring, given], []), "given", "exec"), names)
    assert len(calls) > 5
    for call in calls:
        with pytest.raises(ValueError, match=r"; (choose|did you mean|it takes)"):
            exec(compile(ast.Module([call], []), ast.unparse(call), "exec"), names)
