"""Lists the commands of the package: `python -m alexnet_jax`.

Reads the summaries from the modules' source, because importing all commands takes seconds.
"""

import ast
import sys
from pathlib import Path


def summaries() -> dict[str, str]:
    """Returns the first docstring line of every module of the package that has a `main`."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
        if "main" in functions:
            found[path.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found


def main() -> None:
    """Prints the list; exits with 2 if there are arguments, which belong after a command."""
    commands = summaries()
    if arguments := [word for word in sys.argv[1:] if word not in ("-h", "--help")]:
        name = arguments[0] if arguments[0] in commands else "COMMAND"
        message = f"error: unknown argument {arguments[0]}; run python -m alexnet_jax.{name}"
        print(message, file=sys.stderr)
        sys.exit(2)
    width = max(map(len, commands))
    print("usage: python -m alexnet_jax.COMMAND [--help]\n\ncommands:")
    for name, summary in commands.items():
        print(f"  {name:{width}}  {summary}")


main()
