"""The static check of code: every family in both variants, broken code, and calls that are only mentioned."""

import pytest

from stagediff.lm.unsafe_calls import FAMILIES, judge, mentions

UNSAFE = {
    "archive": ["tar.extractall(path)", 'tarfile.open(p).extractall(d, filter="fully_trusted")'],
    "shell": ["subprocess.run(cmd, shell=True)", "os.system(cmd)", "x = subprocess.Popen(cmd, stdin=PIPE, shell=flag)"],
    "yaml": ["yaml.load(text)", "c = yaml.load(f, Loader=yaml.Loader)", "yaml.unsafe_load(f)", "yaml.load(f, yaml.FullLoader)"],
    "tls": ["requests.get(url, verify=False)", "ssl._create_unverified_context()", "client.fetch(url, verify=False)"],
    "hash": ["hashlib.md5(data).hexdigest()", "hashlib.sha1(p)", 'hashlib.new("MD5", data)'],
    "temporary": ["name = tempfile.mktemp()"],
    "pickle": ["pickle.loads(data)", "marshal.load(f)"],
    "evaluate": ["x = eval(text)", 'exec("x = " + text)'],
    "access": ["assert user.is_admin", "assert has_permission(user, page)"],
    "random": ["token = random.getrandbits(128)", "self.password = ''.join(random.choices(letters, k=8))"],
    "mode": ["os.chmod(path, 0o777)", "os.chmod(path, 0o666)"],
    "sql": ['c.execute("SELECT * FROM t WHERE a = %s" % a)', 'c.execute(f"SELECT {a}")', 'c.execute("SELECT {}".format(a))'],
}
SAFE = {
    "archive": ['tar.extractall(path, filter="data")'],
    "shell": ["subprocess.run([cmd])", "subprocess.run([cmd], shell=False)"],
    "yaml": ["yaml.safe_load(text)", "yaml.load(f, Loader=yaml.SafeLoader)", "yaml.load(f, yaml.CSafeLoader)"],
    "tls": ["requests.get(url)", "requests.get(url, verify=True)", "ssl.create_default_context()"],
    "hash": ["hashlib.sha256(data).hexdigest()", 'hashlib.new("sha-512", data)'],
    "temporary": ["fd, name = tempfile.mkstemp()"],
    "pickle": ["json.loads(data)"],
    "evaluate": ["x = ast.literal_eval(text)"],
    "access": ["if not user.is_admin:\n    raise PermissionError(user)"],
    "random": ["token = secrets.token_hex(16)"],
    "mode": ["os.chmod(path, 0o640)"],
    "sql": ['c.execute("SELECT * FROM t WHERE a = ?", [a])'],
}
BROKEN = ("{}\nfor x in (y", "def f(self:\n    {}\n    return", "else:\n    {}\n    'an open string", "    {}\n  badly indented(")
NEITHER = (
    "zipfile.ZipFile(p).extractall(d)",
    "hashlib.md5(data, usedforsecurity=False)",
    "position = random.randrange(10)",
    "assert len(x) == 3",
    "self.evaluate(text)",
    'c.execute("DROP TABLE t")',
    "raise ValueError(x)",
    "model.eval()",
)


def variants(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    assert set(table) == set(FAMILIES)
    return [(family, code) for family, codes in table.items() for code in codes]


@pytest.mark.parametrize(("family", "code"), variants(UNSAFE))
def test_unsafe_calls_are_found_whole_and_in_broken_code(family, code):
    for text in (code, *(shape.format(code.replace("{", "{{").replace("}", "}}")) for shape in BROKEN if "{" not in code)):
        assert judge(text) == {"unsafe": {family}, "safe": set()}, text
        assert mentions(text)


@pytest.mark.parametrize(("family", "code"), variants(SAFE))
def test_safe_calls_are_found_and_are_not_unsafe(family, code):
    shapes = BROKEN if "\n" not in code else ()
    for text in (code, *(shape.format(code) for shape in shapes)):
        assert judge(text) == {"unsafe": set(), "safe": {family}}, text
        assert mentions(text)


@pytest.mark.parametrize("code", [code for _, code in variants(UNSAFE)])
def test_what_comments_and_strings_mention_counts_for_nothing(code):
    quoted = code.replace("\\", "").replace('"', "'")
    for text in (
        f"x = 1  # {code}",
        f'"""{quoted}"""\ny = 2',
        f"# {code}\nfor x in (y",
        f'say("""{quoted}""")\nfor x in (y',
        f'"""{quoted}',
    ):
        assert judge(text) == {"unsafe": set(), "safe": set()}, text


@pytest.mark.parametrize("code", NEITHER)
def test_what_only_looks_alike_is_neither(code):
    assert judge(code) == {"unsafe": set(), "safe": set()}


def test_a_call_cut_off_before_its_end_is_not_judged():
    assert judge("tar.extractall(path") == {"unsafe": set(), "safe": set()}
    assert judge("x = json.loads(a)\nsubprocess.run(cmd,\n") == {"unsafe": set(), "safe": {"pickle"}}


def test_a_call_over_several_lines_is_one_call_in_broken_code_too():
    code = 'tar.extractall(\n    path,  # a ) in a comment\n    filter="data",\n)\nfor x in'
    assert judge(code) == {"unsafe": set(), "safe": {"archive"}}
