"""What no source may hold: device names out of place, hidden inputs, unsafe loading, paths of a run composed by hand, giants."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.rules.sources import Function, Source, all_sources, dotted_name, imports, package_sources, report, strings
from tests.rules.test_imports import within

CUDA_PLACES = ("spin_megatron/mcore/", "spin_megatron/objective/logprobs_triton.py")
# The worker scripts are programs of another environment.
WORKERS = ("spin_megatron/generation/trtllm_worker.py", "spin_megatron/generation/vllm_worker.py")
ENVIRONMENT_PLACES = ("spin_megatron/mcore/runtime.py", "spin_megatron/launch/", "spin_megatron/cli.py", *WORKERS)
LAYOUT = "spin_megatron/run/layout.py"

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 420
# Longer than this without a docstring a public function's name and types no longer say it all.
MAX_UNDOCUMENTED_LINES = 5

UNSAFE_MODULES = ("pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
UNSAFE_CALLS = ("os.system", "os.popen", "eval", "exec", "yaml.load", "torch.hub.load", "subprocess.getoutput")
# A torch_dist index is a pickle; this module reads it by an unpickler that knows a handful of types.
RESTRICTED_UNPICKLER = "spin_megatron/convert/saved_checkpoint.py"
UNSAFE_ARGUMENTS = ("trust_remote_code", "shell", "allow_pickle")


def functions(source: Source) -> Iterator[tuple[str, Function, bool]]:
    """(qualified name, node, is public) of every function, nested ones included; nested ones are not public."""

    def walk(node: ast.AST, prefix: str, public: bool) -> Iterator[tuple[str, Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield f"{prefix}{child.name}", child, public and not child.name.startswith("_")
                yield from walk(child, f"{prefix}{child.name}.", public=False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.", public and not child.name.startswith("_"))
            else:
                yield from walk(child, prefix, public)

    yield from walk(source.tree, "", public=True)


def length_without_docstring(function: Function) -> int:
    """Lines from `def` to the last one, less those of the docstring."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return total
    prose = function.body[0]
    assert prose.end_lineno is not None
    return total - (prose.end_lineno - prose.lineno + 1)


def test_the_rules_measure_what_they_say() -> None:
    tree = ast.parse('def outer(a,\n          b):\n    """Two\n    lines."""\n    def inner():\n        pass\n    return inner\n')
    source = Source(all_sources()[0].path, "", tree)
    found = {name: (length_without_docstring(node), public) for name, node, public in functions(source)}
    # def (2 lines) + inner (2) + return (1); the docstring's two lines do not count.
    assert found == {"outer": (5, True), "outer.inner": (2, False)}


def test_functions_are_short() -> None:
    offenders = [
        f"{source.at(node)}: {name} has {length_without_docstring(node)} lines, at most {MAX_FUNCTION_LINES}"
        for source in all_sources()
        for name, node, _ in functions(source)
        if length_without_docstring(node) > MAX_FUNCTION_LINES
    ]
    assert not offenders, report(offenders)


def test_files_are_short() -> None:
    lengths = {source.path: len(source.text.splitlines()) for source in all_sources()}
    offenders = [f"{path}: {length} lines, at most {MAX_FILE_LINES}" for path, length in lengths.items() if length > MAX_FILE_LINES]
    assert not offenders, report(offenders)


def test_every_module_says_what_it_is_for() -> None:
    offenders = [str(source.path) for source in all_sources() if source.text.strip() and ast.get_docstring(source.tree) is None]
    assert not offenders, report(offenders)


def test_public_functions_and_classes_say_what_they_do() -> None:
    offenders = []
    for source in package_sources():
        for name, node, public in functions(source):
            if public and length_without_docstring(node) > MAX_UNDOCUMENTED_LINES and ast.get_docstring(node) is None:
                offenders.append(f"{source.at(node)}: {name} has no docstring")
        for statement in source.tree.body:
            if isinstance(statement, ast.ClassDef) and not statement.name.startswith("_") and ast.get_docstring(statement) is None:
                offenders.append(f"{source.at(statement)}: class {statement.name} has no docstring")
    assert not offenders, report(offenders)


def test_every_function_has_types() -> None:
    offenders = []
    for source in all_sources():
        for name, node, _ in functions(source):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [argument.arg for argument in arguments if argument.annotation is None and argument.arg not in ("self", "cls")]
            if bare or node.returns is None:
                offenders.append(f"{source.at(node)}: {name} lacks the type of {', '.join(bare) or 'its result'}")
    assert not offenders, report(offenders)


def test_the_device_is_an_argument_outside_the_modules_that_know_cuda() -> None:
    word = re.compile(r"\bcuda\b")
    offenders = []
    for source in package_sources():
        if within(source, CUDA_PLACES):
            continue
        offenders += [f"{source.at(node)}: {text!r}" for text, node in strings(source) if word.search(text)]
        offenders += [
            f"{source.at(node)}: {dotted_name(node) or '.cuda'}"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute) and node.attr == "cuda"
        ]
        offenders += [f"{source.at(node)}: imports {name}" for name, node in imports(source) if "cuda" in name.split(".")]
    assert not offenders, report(offenders)


def test_an_accelerator_is_asked_whether_it_is_there() -> None:
    # A CUDA build of torch names "cuda" as its accelerator on a machine without a GPU, too, unless it is told to look.
    offenders = []
    for source in all_sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and dotted_name(node.func) == "torch.accelerator.current_accelerator":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if given.get("check_available") != "True":
                    offenders.append(f"{source.at(node)}: pass check_available=True")
    assert not offenders, report(offenders)


def test_the_environment_is_read_only_where_processes_start() -> None:
    readers = ("os.environ", "os.environb", "os.getenv", "os.putenv")
    offenders = []
    for source in package_sources():
        if within(source, ENVIRONMENT_PLACES):
            continue
        offenders += [f"{source.at(node)}: imports {name}" for name, node in imports(source) if name in readers]
        offenders += [
            f"{source.at(node)}: {dotted_name(node)}"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute) and dotted_name(node) in readers
        ]
    assert not offenders, report(offenders)


def path_parts(source: Source) -> Iterator[tuple[str, ast.AST]]:
    """What stands right of a `/` as a string: the fixed start of an f-string counts as "start{"."""
    for node in ast.walk(source.tree):
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)):
            continue
        right = node.right
        if isinstance(right, ast.Constant) and isinstance(right.value, str):
            yield right.value, node
        elif isinstance(right, ast.JoinedStr) and right.values and isinstance(right.values[0], ast.Constant):
            yield f"{right.values[0].value}{{", node


def test_no_path_of_a_run_directory_is_composed_outside_the_layout() -> None:
    layout = next(source for source in package_sources() if source.path.as_posix() == LAYOUT)
    owned = {part for part, _ in path_parts(layout)}
    assert {"iter_{", "theta_{", "run.json", "prompts.parquet"} <= owned, "the layout's names are found"
    offenders = [
        f"{source.at(node)}: / {part!r} is a name of the run directory; take the path from RunLayout"
        for source in package_sources()
        if source is not layout
        for part, node in path_parts(source)
        if part in owned
    ]
    offenders += [
        f"{source.at(node)}: {text!r}; use RunLayout.manifest or run.manifest"
        for source in package_sources()
        if source.path.as_posix() != "spin_megatron/run/manifest.py"
        for text, node in strings(source)
        if text == "MANIFEST.json"
    ]
    assert not offenders, report(offenders)


def test_nothing_is_unpickled_and_no_code_comes_from_data() -> None:
    offenders = []
    for source in all_sources():
        if source.path.as_posix() != RESTRICTED_UNPICKLER:
            unsafe = [(name, node) for name, node in imports(source) if name.partition(".")[0] in UNSAFE_MODULES]
            offenders += [f"{source.at(node)}: imports {name}" for name, node in unsafe]
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            name = dotted_name(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            safe = given.get("weights_only")
            if name in UNSAFE_CALLS or (name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True)):
                offenders.append(f"{source.at(node)}: {name}(...)")
            for argument in UNSAFE_ARGUMENTS:
                value = given.get(argument)
                if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                    offenders.append(f"{source.at(node)}: {name}({argument}=...)")
    assert not offenders, report(offenders)


def test_the_one_unpickler_refuses_what_it_does_not_know() -> None:
    (source,) = (source for source in package_sources() if source.path.as_posix() == RESTRICTED_UNPICKLER)
    used = {node.attr for node in ast.walk(source.tree) if isinstance(node, ast.Attribute) and dotted_name(node.value) == "pickle"}
    assert used == {"Unpickler", "UnpicklingError"}, "no pickle.load, no plain Unpickler"
    unpicklers = [
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and any(dotted_name(base) == "pickle.Unpickler" for base in node.bases)
    ]
    plain = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call) and dotted_name(node.func) == "pickle.Unpickler"]
    assert len(unpicklers) == 1
    assert "find_class" in {function.name for function in unpicklers[0].body if isinstance(function, Function)}
    assert not plain


@pytest.mark.parametrize(
    ("code", "unsafe"),
    [
        ("subprocess.run('ls', shell=True)", True),
        ("subprocess.run(['ls'], shell=False)", False),
        ("load(path, trust_remote_code=flag)", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=True)", False),
        ("import pickle", True),
    ],
)
def test_the_unsafe_loading_rule_sees_what_it_should(code: str, unsafe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(all_sources()[0].path, code, ast.parse(code))
    monkeypatch.setitem(globals(), "all_sources", lambda: (source,))
    if unsafe:
        with pytest.raises(AssertionError):
            test_nothing_is_unpickled_and_no_code_comes_from_data()
    else:
        test_nothing_is_unpickled_and_no_code_comes_from_data()
