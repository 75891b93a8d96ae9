"""What tests of rounds on the device look at. Not a test."""


def paths_laid(inputs, b):
    """Paths of the tree in request b's rows of a pass."""
    rows, hangs = inputs.tokens[b].tolist(), inputs.parents[b].tolist()
    paths = {}
    for row, parent in enumerate(hangs):
        if parent == 0 or parent in paths:
            paths[row] = (*paths.get(parent, ()), rows[row])
    return set(paths.values())


def trees_proposed(drafter):
    """What `propose` says from now on, {(request, tokens committed): set of paths}, filled as it is called."""
    found = {}
    propose = drafter.propose

    def spy(context):
        draft = propose(context)
        for request, tree in zip(context.requests, draft.trees(), strict=True):
            tree = tree.limited(request.depth_limit)
            found[request.sampler.dice.request, len(request.tokens)] = {
                path[: end + 1] for path in map(tuple, tree.paths()) for end in range(len(path))
            }
        return draft

    drafter.propose = spy
    return found


def submit_all(engine, prompts, lengths, **options):
    """Submit prompts, each as the request of its number; returns their uids."""
    return [
        engine.submit(prompt, max_new_tokens=n, request=i, **options)
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]


def served(engine, prompts, lengths, **options):
    """Tokens of requests that join and leave, in the order of their prompts."""
    return finished(engine, submit_all(engine, prompts, lengths, **options))


def served_each(engine, prompts, options):
    """As `served`, with options of its own for each prompt that has some."""
    return finished(engine, [engine.submit(p, **o) for p, o in zip(prompts, options, strict=False)])


def finished(engine, uids):
    """Step until nothing is left to do; tokens of requests, in order."""
    done = {}
    while engine.active:
        for progress in engine.step():
            if progress.chunk.output is not None:
                done[progress.uid] = progress.chunk.output.tokens
    return [done[uid] for uid in uids]
