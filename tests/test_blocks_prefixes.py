"""Prefixes: named by all that their bytes depend on, and found again exactly where a sequence can go on."""

from hypothesis import given
from hypothesis import strategies as st

from tests.block_books import NOTHING, G, Image, L, layout, manager, names, run
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch
from wicore_backend.hmt.names import NameScheme
from wicore_backend.hmt.prefixes import Prefixes


def test_a_prefix_is_found_again_and_shared():
    books = manager(blocks=80)
    first = run(books, range(60))
    again = books.match(names(range(60)), 14)
    assert again == PrefixMatch(resume=0, known=14), "a window is kept at resume points only, and there is none yet"
    books.close(first)
    longer = names([*range(60), *range(500, 530)])
    assert books.match(longer, 22) == PrefixMatch(resume=15, known=15), "the end of what a sequence computed is one"
    used = books.pools[G].active
    second = run(books, [*range(60), *range(500, 530)])
    assert books.pools[G].active - used == 23
    assert second.full == 22
    third = run(books, [*range(60), *range(700, 720)])
    assert third.tables[G][:15].tolist() == second.tables[G][:15].tolist()
    assert third.tables[L][14] == second.tables[L][14] != 0 or second.first[L] > 14
    for blocks in (second, third):
        books.close(blocks)
    books.check_integrity()


def test_the_end_of_a_prompt_is_a_resume_point_while_its_answer_grows():
    books = manager(blocks=80)
    chain = names(range(100))
    blocks = books.open(chain, NOTHING, max_tokens=100, expected_tokens=100)
    books.keep_window(blocks, (41 - 1) // 4)
    for start, end in ((0, 41), *((n, n + 1) for n in range(41, 99))):
        assert books.extend(blocks, start, end)
        books.note(blocks, end)
    assert blocks.first[L] > 10, "the sequence itself has left that window behind"
    assert books.match(names(range(41)), 10) == PrefixMatch(resume=10, known=10)
    books.check_integrity()


def test_what_a_sequence_has_come_past_is_no_resume_point_of_it():
    books = manager(blocks=80)
    blocks = run(books, range(60))
    for count in (15, 10, 2):
        books.keep_window(blocks, count)
        assert blocks.resume_points == []
    books.keep_window(blocks, 16)
    books.keep_window(blocks, 16)
    assert blocks.resume_points == [16]


def test_the_window_of_the_last_full_block_is_there_until_the_next_one_is_full():
    books = manager(blocks=80)
    chain = names(range(60))
    blocks = books.open(chain, NOTHING, max_tokens=60, expected_tokens=60)
    for start, end in ((0, 8), *((n, n + 7) for n in range(8, 43, 7))):
        assert books.extend(blocks, start, end)
        books.note(blocks, end)
    assert books.extend(blocks, 43, 51)  # For a chunk that begins within a block, and is never computed.
    books.close(blocks)
    books.check_integrity()
    assert books.match(chain, 14) == PrefixMatch(resume=10, known=10)


def test_a_place_where_sequences_part_becomes_a_resume_point():
    books = manager(blocks=200)
    system = list(range(50))
    for question, resume in ((100, 0), (200, 0), (300, 12), (400, 12)):
        tokens = [*system, *range(question, question + 37)]
        match = books.match(names(tokens), 21)
        assert match.resume == resume
        assert match.known == (0 if question == 100 else 12)
        books.close(run(books, tokens))


# Names.


def test_another_token_picture_or_tenant_is_another_block():
    seen = set()
    for tokens, images, salt in (
        (range(8), (), ""),
        (range(1, 9), (), ""),
        (range(8), (), "tenant"),
        (range(8), (Image(2, 6),), ""),
        (range(8), (Image(3, 7),), ""),
        (range(8), (Image(2, 6, b"other"),), ""),
        (range(8), (Image(2, 4), Image(4, 6)), ""),
    ):
        chain = names(tokens, images, salt)
        seen |= {chain.first(2)[0], chain.first(2)[1], chain.whole(7)}
    assert len(seen) == 7 * 3
    assert names(range(8)).first(2) == names(range(8)).first(2)
    assert NameScheme(4, b"weights").root("") != NameScheme(4).root("")


@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=5), start=st.integers(0, 40), length=st.integers(1, 20))
def test_a_name_does_not_depend_on_how_many_are_asked_for_at_once(counts, start, length):
    images = (Image(start, start + length),)
    chain = names(range(51), images)
    for count in counts:
        assert len(chain.first(count)) >= count
    assert chain.whole(50) == names(range(51), images).whole(50)
    assert [*chain.first(12)] == [names(range(4 * n), images).first(n)[-1] for n in range(1, 13)]


def test_a_name_covers_a_picture_that_ends_after_the_block():
    ends = [names(range(12), (Image(2, 10, digest),)).first(1)[0] for digest in (b"a", b"b")]
    assert ends[0] != ends[1]


def test_nobody_goes_on_in_the_middle_of_a_picture():
    books = manager(blocks=80)
    tokens, images = list(range(60)), (Image(18, 34),)
    chain = names(tokens, images)
    assert [chain.resumable(n) for n in (4, 5, 8, 9)] == [4, 4, 4, 9]
    blocks = books.open(chain, NOTHING, max_tokens=60, expected_tokens=60)
    books.keep_window(blocks, 6)
    for start, end in ((0, 18), (18, 34), (34, 42), (42, 50)):
        assert books.extend(blocks, start, end)
        books.note(blocks, end)
    assert books.match(names(range(26), images), 6).resume == 4
    books.check_integrity()


class Kept(dict):
    """Of a pool, what can be found."""

    def find(self, name):
        return self.get(name)


def test_where_a_window_ends_in_a_picture_the_one_before_the_picture_is_looked_for():
    chain = names(range(60), (Image(18, 34),))
    blocks = chain.first(12)
    pools = {G: Kept.fromkeys(blocks, 1), L: Kept.fromkeys([*blocks[:7], *blocks[8:]], 1)}
    prefixes = Prefixes(layout(), pools, None)
    assert prefixes.match(chain, 12) == PrefixMatch(resume=4, known=12), "7 has its window, within the picture"
    assert prefixes.match(names(range(60)), 12).known == 4, "without the picture, those that show it are other blocks"
    del pools[L][blocks[2]]
    assert prefixes.match(chain, 12).resume == 2


def test_without_a_local_group_every_block_is_a_resume_point():
    books = BlockManager(layout(groups=(G,)), {G: 40}, max_chunk=8)
    blocks = run(books, range(60))
    assert books.match(names(range(60)), 14) == PrefixMatch(14, 14)
    books.close(blocks)
