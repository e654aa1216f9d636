"""Which files a folder or a pattern stands for: text files or tables, not both; of a data set with splits its train files."""

import glob
import os
import re
import sys
from pathlib import Path

from data.prepare.formats import refuse_unread, table_suffix
from data.prepare.stores import files_at, is_url, size_of
from fms_spec.errors import UserError

# Beside tables these tell about them; README.md and the like are texts only among texts.
ABOUT = re.compile(
    r"(readme|licen[sc]e|copying|notice|citation|changelog)(\.\w+)?"
    r"|_success|_(common_)?metadata|(metadata|stats|dataset_(infos?|dict)|state)\.json|cache-.*\.arrow"
)
LOOSE = (".json", ".csv", ".tsv")  # in a tree of sources these are settings and figures rather than documents
SPLIT = re.compile(r"(?<![a-z])(train|training|valid|validation|val|dev|test|testing|eval|evaluation)(?![a-z])")


def find_files(path, source, split=None):
    """(files in order, the folder that their names are told from) of a folder, pattern or file; says on stderr what is left out.

    split: of a folder with tables in several, None for train.

    Raises:
        UserError: nothing there, texts beside tables, splits that can't be told apart, a link that leads nowhere, or a kind of file
            that isn't read.
    """
    folder = os.path.isdir(path)
    if is_url(path):
        paths, root = files_at(path)
        folder, nothing = not glob.has_magic(path), ""
    elif folder:
        paths, root, nothing = files_below(path), path, "the folder holds no files"
    elif os.path.isfile(path):
        paths, root, nothing = [path], os.path.dirname(path), ""
    else:
        paths, root, nothing = matching(path), glob_root(path), "the pattern matches no file"
    for file in paths:
        if not is_url(file) and not os.path.isfile(file):
            problem = "a link that leads nowhere" if os.path.islink(file) else "neither a file nor a folder"
            raise UserError(f"source {file}: {problem}; mend or remove it")
        refuse_unread(file)
    files = sorted(paths)
    if len(files) > 1:
        files = of_one_kind(files, source, root)
        if folder:
            files = of_one_split(files, source, root, split)
        elif split:
            raise UserError(f"source {source}: split {split} is asked, and a pattern names what to read; leave one of the two out")
    elif split and files:
        raise UserError(f"source {source}: split {split} is asked, and it is one file; leave the split out")
    if not files:
        raise UserError(f"source {source}: {nothing}")
    return files, root


def of_one_kind(files, source, root):
    """Of `files` the texts, or the tables."""
    about = [file for file in files if ABOUT.fullmatch(os.path.basename(file).lower())]
    rest = sorted({*files} - {*about})
    tables, texts = [file for file in rest if table_suffix(file)], [file for file in rest if not table_suffix(file)]
    firm = [file for file in tables if table_suffix(file) not in LOOSE]
    sizes = [sum(map(size_of, group)) for group in (tables, texts)]
    if texts and (firm or sizes[0] > sizes[1]):  # otherwise JSON and CSV are taken for the texts' settings and figures
        most, first = (firm or tables, "tables") if sizes[0] > sizes[1] else (texts, "texts")
        raise UserError(
            f"source {source}: holds tables ({named((firm or tables)[:1], root)}) beside texts ({named(texts[:1], root)}); "
            f"name those to read with a pattern, such as {pattern(most[0], root)} for its {first}, or keep them apart"
        )
    kept = tables if tables and not texts else sorted(file for file in texts + about if not table_suffix(file))
    tell_left_out(sorted({*files} - {*kept}), root, "about the tables" if kept == tables else "JSON and CSV among texts")
    return kept


def of_one_split(files, source, root, wanted):
    """Of a data set's tables those of one split, where their names tell splits apart. wanted: None for train, or all that tell none."""
    splits = {file: split_of(os.path.relpath(file, root)) for file in files if table_suffix(file)}
    others = {*splits.values()} - {"train", None}
    if wanted is None and (not others or len({*splits.values()}) == 1):
        return files
    asked = split_of(wanted or "train") or wanted
    read = [file for file, split in splits.items() if split == asked]
    if wanted and not read:
        there = ", ".join(sorted({*filter(None, splits.values())})) or "none"
        raise UserError(f"source {source}: has no files of split {wanted}; their names tell of {there}")
    if not read or None in splits.values():
        first = min((file for file, split in splits.items() if split != asked), key=lambda file: splits[file] is None)
        raise UserError(
            f"source {source}: some of its files seem to be of another split than {asked} ({named([first], root)}); "
            f"name those to read with a pattern, such as {pattern(first, root)} for all"
        )
    tell_left_out([file for file in files if file not in read], root, f"of other splits than {asked}")
    return read


def split_of(name):
    """The split that a file's path tells, as a word: "train" for all spellings of that; None where it tells none."""
    words = SPLIT.findall(name.lower())
    return None if not words else "train" if words[-1].startswith("train") else words[-1]


def files_below(folder):
    """Every file below a folder. Hidden ones (.git and the like) are left out, as a glob does, and links to folders are not followed."""

    def refuse(error):  # os.walk alone would leave out silently what it cannot list
        raise UserError(f"source {error.filename}: cannot be read ({error.strerror})")

    files, links = [], []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [os.path.join(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    tell_left_out(links, folder, "links to folders")
    return files


def matching(path):
    """What a pattern matches besides folders; a file that it also finds by way of a linked folder is found once."""
    files, seen = [], set()
    for file in sorted(glob.glob(path, recursive=True), key=lambda file: (file.count(os.sep), file)):
        resolved = os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file))
        if not os.path.isdir(file) and resolved not in seen:
            seen.add(resolved)
            files.append(file)
    return files


def glob_root(path):
    """The folder part of a pattern before its first wildcard."""
    parts = Path(path).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return os.path.join(*parts[:fixed]) if fixed else ""


def pattern(file, root):
    """What to type for all files of `file`'s suffix."""
    name = os.path.basename(file)
    ending = name[name.lower().rindex(table_suffix(file)) :] if table_suffix(file) else os.path.splitext(name)[1]
    return f"--source='{os.path.join(glob.escape(root), '**', '*' + ending)}'"


def named(files, root):
    """The first of some files as told from `root`."""
    return Path(os.path.relpath(files[0], root or ".")).as_posix()


def tell_left_out(files, root, why):
    """Say on stderr that some files are left out."""
    if files:
        print(f"warning: {len(files)} of the source are left out ({why}), the first is {named(files, root)}", file=sys.stderr)
