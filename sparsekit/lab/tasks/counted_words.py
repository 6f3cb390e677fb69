"""RULER's word counting (arXiv 2404.06654): `cwe`, the common words of a list, and `fwe`, the frequent coded words.

    >>> from random import Random
    >>> from sparsekit.lab.tasks import task
    >>> sample = task("cwe").at(2048).build(Random(0), units=30)
    >>> sample.prompt.rpartition("most often.\\n")[2][:58]
    '1. hedge 2. cosmic 3. fortune 4. fiddle 5. careful 6. hair'
    >>> len(sample.answers)
    10
    >>> task("cwe").score(" ".join(sample.answers[:9]), sample)
    0.9
    >>> coded = task("fwe").at(2048).build(Random(0), units=200)
    >>> [coded.prompt.count(word) for word in coded.answers]
    [39, 17, 9]

RULER takes the words of `cwe` from wonderwords; ours are a list below, and pairs of short words written as one, so that
128K tokens have enough of them: scores compare with each other, not with published ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import pi
from random import Random
from string import ascii_lowercase

from sparsekit.errors import SparsekitError
from sparsekit.lab.tasks.base import Sample, Task, register
from sparsekit.lab.tasks.needle import ADJECTIVES, NOUNS

__all__ = ["CommonWords", "FrequentWords"]

SHORT_TOKENS = 4096  # below this, cwe repeats words less often
SINGLE_TOKENS = 8192  # below this, single words are enough for it

SINGLE_WORDS = (
    "accept admit advice agree album answer april aunt author bacon bake balance banana bank barn basin beach bean "
    "bear bell belt bench berry bird blade blanket board boat bone book boot border borrow bowl brain branch bread "
    "breath brick broom brush bubble bucket budget build bulb bunch cabin cable cage cake camera camp canal captain "
    "card carpet carrot carry cart cattle ceiling cement chain chair chalk cheese chess chest chicken chimney choir "
    "clay clerk cliff climb clock cloth cloud coal coast coat coffee coin collar color comb cookie cotton couch count "
    "courage cousin cover crab cradle cream crown cup curtain cushion dance dawn deer dentist desk dinner dish doctor "
    "doll donkey door dream dress drink drive drum duck dust earth east echo edge elbow elephant empire energy event "
    "exit expert fabric fact factory fair family farm father favor fence ferry fever field finger fire fish flag "
    "flame flight floor flour flower flute fog folder fork fortune fox frame friend frog fruit fuel future gallery "
    "gate ghost gift giraffe glass glove glue goat gold grain grape grass guest guide guitar gulf habit hair hall hat "
    "heart heat hedge helmet herb hero hill history hobby honey hook horn horse hospital hotel hour house hunt ice "
    "idea ink insect iron jam jar jeans jewel joke journey judge juice jump jungle junior key kitchen kite knee knife "
    "knot label lake lamp land laugh lawn lawyer leaf learn leather lesson letter library light limit linen lion lip "
    "list liver lobby lock lunch machine mail market match meal meat medal melon member memory metal milk mind mine "
    "minute mint mirth mixture model money month moon morning mother motor mouse mouth movie mud muscle museum music "
    "nail nation neck nerve nest net night noise north nose note novel number nurse oak object office oil onion opera "
    "orange orbit oven owner paint palace paper parent park party pasta path peace pear pen pencil people phone photo "
    "piano picture pie pig pilot pin pipe pizza plane plant plate player plum poem poet police pond pool post potato "
    "powder power price prince prize pump quarter queen quilt rack radio rail rain record rent report rice ring road "
    "robin robot rock roof room rope rose rule sack sail salad salt sand sauce scale scarf school score screen seat "
    "secretary seed shadow shark sheep sheet shelf shell ship shirt shoe shop shower shrimp sign silk singer sister "
    "skill skirt sleep sleeve smile smoke snake snow soap soccer sock sofa soil song sound soup south space spider "
    "sponge sport square squash stage stamp star steam stem step stone stop storm story stove straw street string "
    "student sugar suit surprise table tail tailor tank tape taste taxi tea teacher team tent theory thing thread "
    "throat thumb ticket tie time tin title toast tongue tool tooth topic towel tower town toy track trade traffic "
    "train travel tray treat tree trip truck trunk tube uncle valve vase village voice volcano wagon wall wallet "
    "waste watch water wave wax week weight well west whale wheat wheel wing wire wolf wood wool word work worker "
    "world wrist yard year zebra"
).split()


@dataclass(frozen=True)
class CommonWords(Task):
    """A numbered list in which ten words stand `common` times and every other one `uncommon` times.

    A unit is one further uncommon word. One solved example of ten common and `example_words` - 10 others stands before.

    Attributes:
        common, uncommon: times that words stand in the list.
        example: the same of the example's list.
        example_words: different words in it.
        compounds: words are also two of ours written as one; 10,000 of them, for long lists.
    """

    common: int = 30
    uncommon: int = 3
    example: tuple[int, int] = (10, 3)
    example_words: int = 40
    count: int = 10
    compounds: bool = True

    def at(self, tokens: int) -> CommonWords:
        """RULER's smaller counts for prompts below 4096 tokens; single words below 8192."""
        sized = replace(self, compounds=tokens >= SINGLE_TOKENS)
        short = tokens < SHORT_TOKENS
        return replace(sized, common=6, uncommon=1, example=(3, 1), example_words=20) if short else sized

    def build(self, rng: Random, units: int) -> Sample:
        """A prompt whose list has `units` uncommon words."""
        orders = Random(rng.getrandbits(64)), Random(rng.getrandbits(64))
        words = _words(rng, self.compounds)
        shown, shown_answers = self._list(words, self.example_words - self.count, *self.example, orders[0])
        asked, answers = self._list(words, units, self.common, self.uncommon, orders[1])
        example = f"{self._ask(shown)} {self._prefix()} {_numbered(shown_answers)}"
        return Sample(f"{example}\n{self._ask(asked)}", tuple(answers), self._prefix())

    def _list(
        self, words: Iterator[str], others: int, common: int, uncommon: int, order: Random
    ) -> tuple[list[str], list[str]]:
        """(the shuffled list, its common words)."""
        often = [next(words) for _ in range(self.count)]
        try:
            rare = [next(words) for _ in range(others)]
        except StopIteration:
            raise SparsekitError(
                f"{self.name}: {others} different words are more than there are; ask for less."
            ) from None
        listed = often * common + rare * uncommon
        order.shuffle(listed)
        return listed, often

    def _ask(self, listed: list[str]) -> str:
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{_numbered(listed)}\n"
            f"Question: What are the {self.count} most common words in the above list?"
        )

    def _prefix(self) -> str:
        return f"Answer: The top {self.count} words that appear most often in the list are:"


@dataclass(frozen=True)
class FrequentWords(Task):
    """Coded words of six letters whose counts follow a zeta distribution; "..." is the most frequent, and is noise.

    The word of rank k stands floor(n k^-alpha / zeta(alpha)) times among n; a unit is one more n. The answer is ranks 2
    to 4.

    Attributes:
        alpha: of the distribution; 2, whose zeta is pi^2 / 6, is the only one here.
        vocabulary: different words, "..." included; RULER's has one for 50 tokens of prompt.
    """

    vocabulary: int = 2000
    alpha: float = 2.0
    letters: int = 6
    least: int = 60  # n of the shortest prompt: ranks 2 to 4 are then told apart

    def at(self, tokens: int) -> FrequentWords:
        return replace(self, vocabulary=max((tokens - self.max_new_tokens) // 50, 5))

    def build(self, rng: Random, units: int) -> Sample:
        """A prompt of about `least` + `units` words."""
        order, n = Random(rng.getrandbits(64)), self.least + units
        codes = _codes(rng, self.letters)
        words = ["...", *(next(codes) for _ in range(self.vocabulary - 1))]
        counts = [int(n * rank**-self.alpha * 6 / pi**2) for rank in range(1, len(words) + 1)]
        text = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
        order.shuffle(text)
        return Sample(
            prompt=(
                "Read the following coded text and track the frequency of each coded word. Find the three most "
                f"frequently appeared coded words. {' '.join(text)}\n"
                "Question: Do not provide any explanation. Please ignore the dots '....'. "
                "What are the three most frequently appeared words in the above coded text?"
            ),
            answers=tuple(words[1:4]),
            answer_prefix="Answer: According to the coded text above, the three most frequently appeared words are:",
        )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _words(rng: Random, compounds: bool) -> Iterator[str]:
    """Different words in random order."""
    words = [*SINGLE_WORDS, *ADJECTIVES, *NOUNS]
    if compounds:
        words += [first + second for first in (*ADJECTIVES, *NOUNS) for second in NOUNS]
    words = list(dict.fromkeys(words))
    rng.shuffle(words)
    return iter(words)


def _codes(rng: Random, letters: int) -> Iterator[str]:
    """Different words of random letters."""
    seen = set()
    while True:
        word = "".join(rng.choices(ascii_lowercase, k=letters))
        if word not in seen:
            seen.add(word)
            yield word


register(CommonWords("cwe", max_new_tokens=120))
register(FrequentWords("fwe", max_new_tokens=50))
