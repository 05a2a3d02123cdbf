/* btree.c - an ordered set of pairs of integers, in a B+ tree.
 *
 * A change touches one leaf, wherever that has room for it. Where it has not, a second way down
 * relieves the full nodes, or refills those at their least, each before the next, so that nothing
 * has to be passed back up. Every node but the root stays at least half full. */

#include "btree.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LEAF_PAIRS 63u
#define INNER_CHILDREN 50u
#define SLAB_NODES 2048u
#define MOST_SLABS (UINT32_MAX / SLAB_NODES)
#define CACHE_LINE_BYTES 64u
#define NONE UINT32_MAX

/* 1 KiB: wide enough that ten million pairs are five levels, of which all but the leaves stay in
 * the processor's cache, and small enough that shifting half a node costs less than a miss. */
struct db_btree_node {
    uint32_t next, previous; /* the leaves, in order; in a released node, the next of its list */
    uint32_t count;          /* pairs of a leaf, children of an inner node */
    uint32_t padding;
    union {
        struct db_pair pairs[LEAF_PAIRS];
        struct {
            /* bounds[i] is not above any pair under children[i], and above all those before. They
             * lie where pairs do, so that the two kinds of node share their code. */
            struct db_pair bounds[INNER_CHILDREN];
            uint32_t children[INNER_CHILDREN];
        };
    };
};

_Static_assert(sizeof(struct db_btree_node) == 1024, "a node is 1 KiB");
_Static_assert(LEAF_PAIRS == 63 && INNER_CHILDREN <= 63, "search() quarters 64 three times");

static struct db_btree_node *at(const struct db_btree *tree, uint32_t index)
{
    assert(index < tree->fresh);
    return &tree->slabs[index / SLAB_NODES][index % SLAB_NODES];
}

static uint32_t most(uint32_t level)
{
    return level == 0 ? LEAF_PAIRS : INNER_CHILDREN;
}

/* Two nodes at their least fit into one, and half of what does not fit into one is more. */
static uint32_t least(uint32_t level)
{
    return (most(level) - 1) / 2;
}

static bool less(struct db_pair a, struct db_pair b)
{
    /* One wide comparison, which compilers turn into two instructions without a branch. */
    return (((unsigned __int128)a.major << 64) | a.minor) <
           (((unsigned __int128)b.major << 64) | b.minor);
}

static bool equal(struct db_pair a, struct db_pair b)
{
    return a.major == b.major && a.minor == b.minor;
}

/* Without branches a search would load its steps one by one, so all of a node is fetched at once,
 * before as much as its count is looked at. */
static void fetch(const struct db_btree *tree, uint32_t index)
{
    const struct db_btree_node *node = at(tree, index);

    for (uint32_t i = 0; i < sizeof *node; i += CACHE_LINE_BYTES)
        __builtin_prefetch((const char *)node + i);
}

/* How many of a node's pairs, which are in order, are less than this one, or not above it. Where a
 * pair lies is what a processor cannot predict. So there is no branch at all: three rounds, each of
 * which compares with three pairs at once and keeps a quarter, whatever the count. What lies behind
 * the last pair is compared too, and does not count. */
static inline uint32_t search(const struct db_btree_node *node, struct db_pair pair, bool or_equal)
{
    uint32_t found = 0;

#pragma GCC unroll 3
    for (uint32_t quarter = 16; quarter > 0; quarter /= 4) {
        uint32_t quarters = 0;
#pragma GCC unroll 3
        for (uint32_t i = 1; i <= 3; i++) {
            uint32_t tried = found + i * quarter;
            struct db_pair other = node->pairs[tried - 1];
            bool passes = or_equal ? !less(pair, other) : less(other, pair);
            quarters += (tried <= node->count) & passes;
        }
        found += quarters * quarter;
    }
    return found;
}

static uint32_t position_of(const struct db_btree_node *leaf, struct db_pair pair)
{
    return search(leaf, pair, false);
}

/* Which child the pair is under: the last whose bound is not above it. The first bound never is. */
static uint32_t child_of(const struct db_btree_node *inner, struct db_pair pair)
{
    uint32_t found = search(inner, pair, true);

    assert(found > 0);
    return found - 1;
}

/* ---- the pool of nodes ----------------------------------------------------------------------- */

/* Nodes never move. A slab is 2 MiB, which where the kernel has huge pages is one of them: in a
 * large tree most steps would otherwise miss in the processor's table of pages too. A tree that
 * needs but a part of its first slab should not take a huge page for it. */
static int grow(struct db_btree *tree)
{
    const size_t slab_bytes = SLAB_NODES * sizeof(struct db_btree_node);

    if (tree->slab_count >= MOST_SLABS)
        return -ENOMEM;
    void *slabs = realloc(tree->slabs, (tree->slab_count + 1) * sizeof tree->slabs[0]);
    if (slabs == NULL)
        return -ENOMEM;
    tree->slabs = slabs;
    void *slab = aligned_alloc(slab_bytes, slab_bytes);
    if (slab == NULL)
        return -ENOMEM;
    if (tree->slab_count > 0)
        (void)madvise(slab, slab_bytes, MADV_HUGEPAGE); /* advice: without it all works as well */
    tree->slabs[tree->slab_count++] = slab;
    tree->free_nodes += SLAB_NODES;
    return 0;
}

static uint32_t acquire(struct db_btree *tree)
{
    uint32_t index = tree->released;

    assert(tree->free_nodes > 0); /* or room was not made */
    if (index != NONE)
        tree->released = at(tree, index)->next;
    else
        index = tree->fresh++;
    assert(index < tree->slab_count * SLAB_NODES);
    tree->free_nodes--;
    struct db_btree_node *node = at(tree, index);
    node->count = 0;
    node->next = node->previous = NONE;
    return index;
}

static void release(struct db_btree *tree, uint32_t index)
{
    at(tree, index)->count = 0;
    at(tree, index)->next = tree->released;
    tree->released = index;
    tree->free_nodes++;
    assert(tree->free_nodes < tree->slab_count * SLAB_NODES);
}

int db_btree_open(struct db_btree *tree)
{
    *tree = (struct db_btree){.released = NONE};
    int rc = grow(tree);
    if (rc == 0)
        tree->root = acquire(tree);
    return rc;
}

void db_btree_close(struct db_btree *tree)
{
    for (uint32_t i = 0; i < tree->slab_count; i++)
        free(tree->slabs[i]);
    free(tree->slabs);
    *tree = (struct db_btree){0};
}

int db_btree_make_room(struct db_btree *tree, uint32_t inserts)
{
    /* An insert splits at most one node of each level, and gives the tree a new root. */
    uint32_t needed = inserts * (tree->depth + 2);

    assert(needed <= SLAB_NODES);
    return tree->free_nodes >= needed ? 0 : grow(tree);
}

/* ---- moving pairs between nodes -------------------------------------------------------------- */

static void move(struct db_btree_node *to, uint32_t to_position, const struct db_btree_node *from,
                 uint32_t from_position, uint32_t count, uint32_t level)
{
    assert(to_position + count <= most(level));
    assert(from_position + count <= most(level));
    memmove(&to->pairs[to_position], &from->pairs[from_position], count * sizeof to->pairs[0]);
    if (level > 0)
        memmove(&to->children[to_position], &from->children[from_position],
                count * sizeof to->children[0]);
}

/* Shares out the contents of children[i] and children[i + 1] evenly. */
static void level_out(struct db_btree *tree, struct db_btree_node *parent, uint32_t i,
                      uint32_t level)
{
    struct db_btree_node *left = at(tree, parent->children[i]);
    struct db_btree_node *right = at(tree, parent->children[i + 1]);
    uint32_t half = (left->count + right->count) / 2;

    if (left->count > half) {
        uint32_t moved = left->count - half;
        move(right, moved, right, 0, right->count, level);
        move(right, 0, left, half, moved, level);
        left->count -= moved;
        right->count += moved;
    } else {
        uint32_t moved = half - left->count;
        move(left, left->count, right, 0, moved, level);
        move(right, 0, right, moved, right->count - moved, level);
        left->count += moved;
        right->count -= moved;
    }
    parent->bounds[i + 1] = right->pairs[0];
}

/* Moves the upper half of children[i] to a new node after it. */
static void split(struct db_btree *tree, struct db_btree_node *parent, uint32_t i, uint32_t level)
{
    uint32_t right_index = acquire(tree);
    uint32_t left_index = parent->children[i];
    struct db_btree_node *left = at(tree, left_index);
    struct db_btree_node *right = at(tree, right_index);
    uint32_t half = left->count / 2;

    assert(parent->count < INNER_CHILDREN);
    move(right, 0, left, half, left->count - half, level);
    right->count = left->count - half;
    left->count = half;
    if (level == 0) {
        right->previous = left_index;
        right->next = left->next;
        left->next = right_index;
        if (right->next != NONE)
            at(tree, right->next)->previous = right_index;
    }
    move(parent, i + 2, parent, i + 1, parent->count - i - 1, level + 1);
    parent->bounds[i + 1] = right->pairs[0];
    parent->children[i + 1] = right_index;
    parent->count++;
}

/* Puts the contents of children[i + 1] behind those of children[i]. */
static void merge(struct db_btree *tree, struct db_btree_node *parent, uint32_t i, uint32_t level)
{
    uint32_t right_index = parent->children[i + 1];
    struct db_btree_node *left = at(tree, parent->children[i]);
    struct db_btree_node *right = at(tree, right_index);

    move(left, left->count, right, 0, right->count, level);
    left->count += right->count;
    if (level == 0) {
        left->next = right->next;
        if (right->next != NONE)
            at(tree, right->next)->previous = parent->children[i];
    }
    release(tree, right_index);
    move(parent, i + 1, parent, i + 2, parent->count - i - 2, level + 1);
    parent->count--;
}

/* Makes way in children[i], which is full. A neighbour with room is asked first: that keeps nodes
 * fuller than splitting alone would, most of all when pairs come in order. With little room it is
 * not worth it, because the node would soon be full again. */
static void relieve(struct db_btree *tree, struct db_btree_node *parent, uint32_t i,
                    uint32_t level)
{
    uint32_t roomy = most(level) - most(level) / 4;

    if (i > 0 && at(tree, parent->children[i - 1])->count <= roomy)
        level_out(tree, parent, i - 1, level);
    else if (i + 1 < parent->count && at(tree, parent->children[i + 1])->count <= roomy)
        level_out(tree, parent, i, level);
    else
        split(tree, parent, i, level);
}

/* Makes sure that children[i], which is at its least, can lose one more. */
static void refill(struct db_btree *tree, struct db_btree_node *parent, uint32_t i, uint32_t level)
{
    uint32_t left = i > 0 ? i - 1 : i;

    assert(parent->count >= 2);
    if (at(tree, parent->children[left])->count + at(tree, parent->children[left + 1])->count <=
        most(level))
        merge(tree, parent, left, level);
    else
        level_out(tree, parent, left, level);
}

/* ---- changing the set ------------------------------------------------------------------------ */

/* Makes sure that the leaf for this pair has room. On the way down every full node is relieved, so
 * that its parent, which may get one more child, was relieved before it. */
static void make_way(struct db_btree *tree, struct db_pair pair)
{
    if (at(tree, tree->root)->count == most(tree->depth)) {
        uint32_t root = acquire(tree);
        struct db_btree_node *node = at(tree, root);
        node->count = 1;
        node->bounds[0] = (struct db_pair){0, 0};
        node->children[0] = tree->root;
        split(tree, node, 0, tree->depth);
        tree->root = root;
        tree->depth++;
    }

    struct db_btree_node *node = at(tree, tree->root);
    for (uint32_t level = tree->depth; level > 0; level--) {
        uint32_t i = child_of(node, pair);
        if (at(tree, node->children[i])->count == most(level - 1)) {
            relieve(tree, node, i, level - 1);
            i = child_of(node, pair);
        }
        node = at(tree, node->children[i]);
    }
}

/* Makes sure that the leaf of this pair can lose one. */
static void make_spare(struct db_btree *tree, struct db_pair pair)
{
    struct db_btree_node *node = at(tree, tree->root);

    for (uint32_t level = tree->depth; level > 0; level--) {
        uint32_t i = child_of(node, pair);
        if (at(tree, node->children[i])->count <= least(level - 1)) {
            refill(tree, node, i, level - 1);
            i = child_of(node, pair);
        }
        uint32_t child = node->children[i];
        if (node->count == 1) {
            /* Only the root can be left with one child, which then takes its place. */
            assert(level == tree->depth);
            release(tree, tree->root);
            tree->root = child;
            tree->depth--;
        }
        node = at(tree, child);
    }
}

void db_btree_insert(struct db_btree *tree, struct db_btree_cursor cursor, struct db_pair pair)
{
    struct db_btree_node *leaf = at(tree, cursor.leaf);

    if (leaf->count == LEAF_PAIRS) {
        make_way(tree, pair);
        cursor = db_btree_find(tree, pair);
        leaf = at(tree, cursor.leaf);
    }
    uint32_t position = cursor.position;
    assert(position <= leaf->count);
    assert(position == 0 || less(leaf->pairs[position - 1], pair));
    assert(position == leaf->count || less(pair, leaf->pairs[position])); /* not there yet */
    move(leaf, position + 1, leaf, position, leaf->count - position, 0);
    leaf->pairs[position] = pair;
    leaf->count++;
    tree->count++;
}

void db_btree_remove(struct db_btree *tree, struct db_btree_cursor cursor)
{
    struct db_btree_node *leaf = at(tree, cursor.leaf);

    assert(cursor.position < leaf->count);
    if (leaf->count <= least(0) && tree->depth > 0) {
        struct db_pair pair = leaf->pairs[cursor.position];
        make_spare(tree, pair);
        cursor = db_btree_find(tree, pair);
        leaf = at(tree, cursor.leaf);
        assert(cursor.position < leaf->count);
        assert(equal(leaf->pairs[cursor.position], pair));
    }
    uint32_t position = cursor.position;
    move(leaf, position, leaf, position + 1, leaf->count - position - 1, 0);
    leaf->count--;
    tree->count--;
}

/* Both places are in one leaf: what lies between them steps aside. */
static void shift(struct db_btree_node *leaf, uint32_t from, uint32_t to, struct db_pair pair)
{
    if (from < to) {
        to--; /* the place is counted with the old pair in it */
        move(leaf, from, leaf, from + 1, to - from, 0);
    } else {
        move(leaf, to + 1, leaf, to, from - to, 0);
    }
    leaf->pairs[to] = pair;
}

void db_btree_replace(struct db_btree *tree, struct db_btree_cursor cursor,
                      struct db_btree_cursor place, struct db_pair pair)
{
    struct db_btree_node *leaf = at(tree, cursor.leaf);
    uint32_t position = cursor.position;

    assert(position < leaf->count);
    if (place.leaf == cursor.leaf) {
        shift(leaf, position, place.position, pair);
        return;
    }
    if (at(tree, place.leaf)->count < LEAF_PAIRS) {
        db_btree_insert(tree, place, pair); /* and nothing moved that is in another leaf */
        db_btree_remove(tree, cursor);
    } else {
        db_btree_remove(tree, cursor);
        db_btree_insert(tree, db_btree_find(tree, pair), pair);
    }
}

/* ---- looking at the set ---------------------------------------------------------------------- */

void db_btree_find_all(struct db_btree_search *searches, uint32_t count)
{
    uint32_t deepest = 0;

    for (uint32_t i = 0; i < count; i++) {
        const struct db_btree *tree = searches[i].tree;
        searches[i].found.leaf = tree->root;
        deepest = tree->depth > deepest ? tree->depth : deepest;
    }
    for (uint32_t level = deepest; level > 0; level--) {
        for (struct db_btree_search *search = searches; search < searches + count; search++) {
            if (search->tree->depth < level)
                continue;
            const struct db_btree_node *node = at(search->tree, search->found.leaf);
            search->found.leaf = node->children[child_of(node, search->pair)];
            fetch(search->tree, search->found.leaf);
        }
    }
    for (struct db_btree_search *search = searches; search < searches + count; search++)
        search->found.position = position_of(at(search->tree, search->found.leaf), search->pair);
}

struct db_btree_cursor db_btree_find(const struct db_btree *tree, struct db_pair pair)
{
    struct db_btree_search search = {.tree = tree, .pair = pair};

    db_btree_find_all(&search, 1);
    return search.found;
}

bool db_btree_settle(const struct db_btree *tree, struct db_btree_cursor *cursor)
{
    const struct db_btree_node *leaf = at(tree, cursor->leaf);

    if (cursor->position < leaf->count)
        return true;
    if (leaf->next == NONE)
        return false;
    *cursor = (struct db_btree_cursor){leaf->next, 0};
    return true;
}

bool db_btree_seek(const struct db_btree *tree, struct db_pair pair,
                   struct db_btree_cursor *cursor)
{
    *cursor = db_btree_find(tree, pair);
    return db_btree_settle(tree, cursor);
}

bool db_btree_next(const struct db_btree *tree, struct db_btree_cursor *cursor)
{
    const struct db_btree_node *leaf = at(tree, cursor->leaf);

    if (cursor->position + 1 < leaf->count) {
        cursor->position++;
        return true;
    }
    if (leaf->next == NONE)
        return false;
    *cursor = (struct db_btree_cursor){leaf->next, 0};
    return true;
}

bool db_btree_previous(const struct db_btree *tree, struct db_btree_cursor *cursor)
{
    const struct db_btree_node *leaf = at(tree, cursor->leaf);

    if (cursor->position > 0) {
        cursor->position--;
        return true;
    }
    if (leaf->previous == NONE)
        return false;
    *cursor = (struct db_btree_cursor){leaf->previous, at(tree, leaf->previous)->count - 1};
    return true;
}

struct db_pair db_btree_get(const struct db_btree *tree, struct db_btree_cursor cursor)
{
    const struct db_btree_node *leaf = at(tree, cursor.leaf);

    assert(cursor.position < leaf->count);
    return leaf->pairs[cursor.position];
}

/* ---- checking -------------------------------------------------------------------------------- */

struct walk {
    uint64_t pairs;
    uint32_t nodes;
    uint32_t last_leaf;
};

static bool valid_leaf(const struct db_btree *tree, uint32_t index, struct walk *walk)
{
    const struct db_btree_node *leaf = at(tree, index);

    if (leaf->previous != walk->last_leaf)
        return false;
    if (walk->last_leaf != NONE && at(tree, walk->last_leaf)->next != index)
        return false;
    walk->last_leaf = index;
    walk->pairs += leaf->count;
    return true;
}

/* Everything under a node is in [low, high). */
static bool valid_node(const struct db_btree *tree, uint32_t index, uint32_t level,
                       struct db_pair low, struct db_pair high, struct walk *walk)
{
    if (index >= tree->fresh || walk->nodes++ >= tree->fresh)
        return false;
    const struct db_btree_node *node = at(tree, index);
    uint32_t fewest = index != tree->root ? least(level) : level > 0 ? 2 : 0;

    if (node->count < fewest || node->count > most(level))
        return false;
    for (uint32_t i = 0; i < node->count; i++) {
        if (less(node->pairs[i], low) || !less(node->pairs[i], high))
            return false;
        if (i > 0 && !less(node->pairs[i - 1], node->pairs[i]))
            return false;
    }
    if (level == 0)
        return valid_leaf(tree, index, walk);
    if (less(low, node->bounds[0]))
        return false;
    for (uint32_t i = 0; i < node->count; i++) {
        struct db_pair end = i + 1 < node->count ? node->bounds[i + 1] : high;
        if (!valid_node(tree, node->children[i], level - 1, node->bounds[i], end, walk))
            return false;
    }
    return true;
}

bool db_btree_valid(const struct db_btree *tree)
{
    struct walk walk = {.last_leaf = NONE};
    struct db_pair low = {0, 0}, high = {UINT64_MAX, UINT64_MAX};

    if (!valid_node(tree, tree->root, tree->depth, low, high, &walk))
        return false;
    if (at(tree, walk.last_leaf)->next != NONE || walk.pairs != tree->count)
        return false;

    uint32_t released = 0;
    for (uint32_t i = tree->released; i != NONE; i = at(tree, i)->next)
        if (++released > tree->fresh)
            return false;
    return walk.nodes + released == tree->fresh &&
           tree->free_nodes == tree->slab_count * SLAB_NODES - tree->fresh + released;
}
