/* btree.h - an ordered set of pairs of integers, in a B+ tree. extent.c is made of two of these.
 *
 * Pairs are ordered by major, then minor. Not thread-safe: callers hold a lock. */
#ifndef DUALBLADE_BTREE_H
#define DUALBLADE_BTREE_H

#include <stdbool.h>
#include <stdint.h>

struct db_pair {
    uint64_t major, minor;
};

struct db_btree_node;

struct db_btree {
    struct db_btree_node **slabs; /* a pool of nodes, which name each other by their index in it */
    uint32_t slab_count;
    uint32_t fresh;    /* the first node that was never used */
    uint32_t released; /* a list of nodes that were used and are free again */
    uint32_t free_nodes;
    uint32_t root;
    uint32_t depth; /* levels above the leaves */
    uint64_t count; /* pairs */
};

/* A place in a tree: that of a pair, or between two. Any change of the tree makes it invalid. */
struct db_btree_cursor {
    uint32_t leaf;
    uint32_t position; /* as many as the leaf has pairs: behind the last of them */
};

int db_btree_open(struct db_btree *tree); /* -ENOMEM */
void db_btree_close(struct db_btree *tree);
/* Makes sure that this many inserts find the nodes they need. -ENOMEM, and nothing changed. */
int db_btree_make_room(struct db_btree *tree, uint32_t inserts);
/* Several searches, in one tree or in some. Side by side they wait for memory together. */
struct db_btree_search {
    const struct db_btree *tree;
    struct db_pair pair;
    struct db_btree_cursor found; /* as by find() */
};
void db_btree_find_all(struct db_btree_search *searches, uint32_t count);
/* The place where this pair is or, if it is not there, where it would be inserted. */
struct db_btree_cursor db_btree_find(const struct db_btree *tree, struct db_pair pair);
/* Moves from behind a leaf's last pair to the pair after it, so that the cursor stands on one.
 * False: there is none, and nothing changed. */
bool db_btree_settle(const struct db_btree *tree, struct db_btree_cursor *cursor);
/* Both: stands on the first pair that is not below `pair`. */
bool db_btree_seek(const struct db_btree *tree, struct db_pair pair,
                   struct db_btree_cursor *cursor);

/* Room was made before, the pair is not there, and the cursor is what find() gave for it. */
void db_btree_insert(struct db_btree *tree, struct db_btree_cursor cursor, struct db_pair pair);
/* Removes the pair that the cursor stands on. */
void db_btree_remove(struct db_btree *tree, struct db_btree_cursor cursor);
/* Removes the pair that the cursor stands on, and inserts one that is not there, which find() gave
 * this place for. Room was made. */
void db_btree_replace(struct db_btree *tree, struct db_btree_cursor cursor,
                      struct db_btree_cursor place, struct db_pair pair);

/* Steps to the pair after, or to the one before. False: there is none, and nothing changed. */
bool db_btree_next(const struct db_btree *tree, struct db_btree_cursor *cursor);
bool db_btree_previous(const struct db_btree *tree, struct db_btree_cursor *cursor);
struct db_pair db_btree_get(const struct db_btree *tree, struct db_btree_cursor cursor);

/* Order, fill, links and counts of every node. O(n). */
bool db_btree_valid(const struct db_btree *tree);

#endif
