// Many slides, each in shards, then merged. The list is that of `wsiseg run --slides`: columns path, mpp, seeds; only path is needed.
//   nextflow run examples/wsiseg.nf --slides slides.csv --out results --shards 4
// With -resume it resumes. The shards of a slide share its folder, so tasks write into `out` itself, which all nodes must see: no publishDir.
params.slides = 'slides.csv'
params.out = 'wsiseg-out'
params.shards = 4
params.options = ''

process SHARD {
    cpus 4
    memory '16 GB'
    time '8 h'
    errorStrategy { task.exitStatus in [1, 2] ? 'finish' : 'retry' } // wrong input stays wrong; anything else resumes
    maxRetries 3

    input:
    tuple val(name), val(slide), val(options), val(shard)

    output:
    tuple val(name), val(shard)

    script:
    """
    wsiseg run '${slide}' --out '${file(params.out)}' --shard ${shard}/${params.shards} ${options} ${params.options}
    """
}

process MERGE {
    memory '8 GB'
    time '1 h'

    input:
    tuple val(name), val(shards)

    output:
    val name

    script:
    """
    wsiseg merge '${file(params.out)}/${name}'
    """
}

workflow {
    def folder = file(params.slides).parent
    def count = params.shards as int
    def slides = file(params.slides).splitCsv(header: true).collect { row ->
        def slide = folder.resolve(row.path)
        def mpp = row.mpp ? "--mpp ${row.mpp}" : ''
        def seeds = row.seeds ? "--seeds '${folder.resolve(row.seeds)}'" : ''
        [slide.name.replaceFirst(/(?i)\.ome\.tiff?$|\.[^.]*$/, ''), "${slide}", "${mpp} ${seeds}"] // the first is the name of the run's folder
    }
    if (slides.collect { one -> one[0] }.toSet().size() < slides.size()) {
        error 'two slides of one name: give them lists and folders of their own'
    }
    SHARD(channel.fromList(slides).combine(channel.of(1..count)))
    MERGE(SHARD.out.groupTuple(size: count))
}
