"""Folders of images, as people have them or as data sets are published, to shards and their index.

    python -m adala.data.convert imagenet ILSVRC2012/ shards/ --workers 16 --max-size 512

``sources`` lists what a folder holds, ``published`` knows the layouts of published data sets, ``encoding`` makes a
sample of an item, ``shards`` writes one shard, and ``conversion`` all of a split: in several processes, to be taken up
after a kill, and with the same bytes whatever happened meanwhile.
"""
