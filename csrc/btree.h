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

/* A place in a tree; any change of the tree makes it invalid. */
struct db_btree_cursor {
    uint32_t leaf;
    uint32_t position;
};

int db_btree_open(struct db_btree *tree); /* -ENOMEM */
void db_btree_close(struct db_btree *tree);
/* Makes sure that this many inserts find the nodes they need. -ENOMEM, and nothing changed. */
int db_btree_make_room(struct db_btree *tree, uint32_t inserts);
/* Room was made before, and the pair is not there. */
void db_btree_insert(struct db_btree *tree, struct db_pair pair);
/* The pair is there. */
void db_btree_remove(struct db_btree *tree, struct db_pair pair);
/* Removes the old pair, which is there, and inserts the new one, which is not; room was made. In
 * place where the order allows it. */
void db_btree_replace(struct db_btree *tree, struct db_pair old, struct db_pair new);

/* Stands on the first pair that is not below `pair`. False: there is none, and the cursor stands
 * after the last pair. */
bool db_btree_seek(const struct db_btree *tree, struct db_pair pair,
                   struct db_btree_cursor *cursor);
/* Steps to the pair after, or to the one before. False: there is none, and nothing changed. */
bool db_btree_next(const struct db_btree *tree, struct db_btree_cursor *cursor);
bool db_btree_previous(const struct db_btree *tree, struct db_btree_cursor *cursor);
struct db_pair db_btree_get(const struct db_btree *tree, struct db_btree_cursor cursor);

/* Order, fill, links and counts of every node. O(n). */
bool db_btree_valid(const struct db_btree *tree);

#endif
